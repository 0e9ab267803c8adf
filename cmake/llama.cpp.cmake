# The llama.cpp source tree: fetched, checked, unpacked, patched, in LLAMA_CPP_DIR.
#
# It comes from the sdist of llama-cpp-python. Version and SHA-256 stand in requirements.lock.

set(LLAMA_CPP_DIR "${CMAKE_BINARY_DIR}/source")

# what the libraries are built from, the tables of which backend supports which op, and the converter
set(LLAMA_CPP_PARTS CMakeLists.txt LICENSE cmake conversion convert_hf_to_gguf.py docs/ops ggml
    gguf-py/gguf include src tools/mtmd vendor)

set(lock "${CMAKE_SOURCE_DIR}/requirements.lock")
file(READ "${lock}" text)
if(NOT text MATCHES "llama-cpp-python==([^ ;]+)[^\n]*\n *--hash=sha256:([0-9a-f]+)")
    message(FATAL_ERROR "no llama-cpp-python with its SHA-256 in ${lock}")
endif()
set(LLAMA_CPP_PYTHON_VERSION "${CMAKE_MATCH_1}")
set(LLAMA_CPP_PYTHON_SHA256 "${CMAKE_MATCH_2}")

# git must not take the tree for a part of the repository around it: `git apply` would skip every
# file, and the commit in the libraries' version would be ours
set(ENV{GIT_CEILING_DIRECTORIES} "${CMAKE_BINARY_DIR}")
unset(ENV{GIT_DIR})
unset(ENV{GIT_WORK_TREE})

# The sdist's path in `out`, from the user's cache, or from pip into it.
function(fetch_sdist out)
    if(WIN32)
        set(cache "$ENV{LOCALAPPDATA}")
    elseif(APPLE)
        set(cache "$ENV{HOME}/Library/Caches")
    elseif(NOT "$ENV{XDG_CACHE_HOME}" STREQUAL "")
        set(cache "$ENV{XDG_CACHE_HOME}")
    else()
        set(cache "$ENV{HOME}/.cache")
    endif()
    cmake_path(CONVERT "${cache}/csp-edge" TO_CMAKE_PATH_LIST cache)
    set(sdist "${cache}/llama_cpp_python-${LLAMA_CPP_PYTHON_VERSION}.tar.gz")
    set(${out} "${sdist}" PARENT_SCOPE)

    if(EXISTS "${sdist}")
        file(SHA256 "${sdist}" sha256)
        if(sha256 STREQUAL LLAMA_CPP_PYTHON_SHA256)
            return()
        endif()
    endif()

    # pip looks into the sdist for its metadata, and needs no network for that when the build
    # backend, the same as ours, is there already
    string(RANDOM LENGTH 8 unique)
    set(download "${cache}/download-${unique}")
    set(requirement "llama-cpp-python==${LLAMA_CPP_PYTHON_VERSION}")
    file(WRITE "${download}/requirements.txt"
        "${requirement} --hash=sha256:${LLAMA_CPP_PYTHON_SHA256}\n")
    message(STATUS "Downloading the source of ${requirement} to ${cache}")
    find_package(Python REQUIRED COMPONENTS Interpreter)
    execute_process(
        COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --no-deps --no-build-isolation
            --no-binary :all: --dest "${download}" --requirement "${download}/requirements.txt"
        RESULT_VARIABLE failed
        OUTPUT_VARIABLE output
        ERROR_VARIABLE output)
    file(GLOB downloaded "${download}/*.tar.gz")
    if(failed OR NOT downloaded)
        file(REMOVE_RECURSE "${download}")
        message(FATAL_ERROR "pip could not download the source of ${requirement}:\n${output}")
    endif()
    file(RENAME "${downloaded}" "${sdist}")
    file(REMOVE_RECURSE "${download}")
endfunction()

# Unpacks the parts into `dir`, or copies them from LLAMA_CPP_SOURCE_DIR.
function(unpack dir)
    if(LLAMA_CPP_SOURCE_DIR)
        foreach(part IN LISTS LLAMA_CPP_PARTS)
            if(NOT EXISTS "${LLAMA_CPP_SOURCE_DIR}/${part}")
                message(FATAL_ERROR
                    "LLAMA_CPP_SOURCE_DIR: no llama.cpp tree in ${LLAMA_CPP_SOURCE_DIR}, "
                    "it has no ${part}")
            endif()
            cmake_path(GET part PARENT_PATH parent)
            file(COPY "${LLAMA_CPP_SOURCE_DIR}/${part}" DESTINATION "${dir}/${parent}")
        endforeach()
    else()
        fetch_sdist(sdist)
        set(root "llama_cpp_python-${LLAMA_CPP_PYTHON_VERSION}")
        list(TRANSFORM LLAMA_CPP_PARTS PREPEND "${root}/vendor/llama.cpp/" OUTPUT_VARIABLE patterns)
        file(ARCHIVE_EXTRACT INPUT "${sdist}" DESTINATION "${dir}.sdist" PATTERNS ${patterns})
        file(RENAME "${dir}.sdist/${root}/vendor/llama.cpp" "${dir}")
        file(REMOVE_RECURSE "${dir}.sdist")
    endif()
endfunction()

# Applies `patches`, in order, to the tree in `dir`.
function(apply_patches dir patches)
    find_package(Git QUIET)
    if(NOT Git_FOUND)
        message(FATAL_ERROR "git, which applies the patches, is missing: install it")
    endif()
    foreach(patch IN LISTS patches)
        execute_process(
            COMMAND "${GIT_EXECUTABLE}" -c core.autocrlf=false apply --whitespace=nowarn "${patch}"
            WORKING_DIRECTORY "${dir}"
            RESULT_VARIABLE failed
            ERROR_VARIABLE output)
        if(failed)
            if(LLAMA_CPP_SOURCE_DIR)
                set(version "in ${LLAMA_CPP_SOURCE_DIR}")
            else()
                set(version "of llama-cpp-python ${LLAMA_CPP_PYTHON_VERSION}")
            endif()
            cmake_path(GET patch FILENAME name)
            message(FATAL_ERROR "patches/${name} does not fit the llama.cpp ${version}:\n${output}")
        endif()
    endforeach()
endfunction()

# Makes `to` hold the files of `from`. What is the same keeps its time, and is not compiled again.
function(synchronize from to)
    file(GLOB_RECURSE new RELATIVE "${from}" "${from}/*")
    file(GLOB_RECURSE old RELATIVE "${to}" "${to}/*")
    list(REMOVE_ITEM old ${new})
    foreach(file IN LISTS old)
        file(REMOVE "${to}/${file}")
    endforeach()
    foreach(file IN LISTS new)
        cmake_path(GET file PARENT_PATH parent)
        file(MAKE_DIRECTORY "${to}/${parent}")
        file(COPY_FILE "${from}/${file}" "${to}/${file}" ONLY_IF_DIFFERENT)
    endforeach()
endfunction()

set(patches "")
if(NOT CSP_EDGE_UNPATCHED)
    file(GLOB patches CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/patches/*.patch")
endif()
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${lock}" ${patches})

# a local tree may have changed: it is looked at whenever CMake runs
set(state "")
foreach(file IN LISTS patches ITEMS "${CMAKE_CURRENT_LIST_FILE}")
    file(SHA256 "${file}" sha256)
    string(APPEND state "${file} ${sha256}\n")
endforeach()
string(APPEND state "${LLAMA_CPP_PYTHON_SHA256}\n")
set(previous "")
if(EXISTS "${LLAMA_CPP_DIR}.state")
    file(READ "${LLAMA_CPP_DIR}.state" previous)
endif()

if(LLAMA_CPP_SOURCE_DIR OR NOT state STREQUAL previous)
    set(fresh "${LLAMA_CPP_DIR}.new")
    file(REMOVE "${LLAMA_CPP_DIR}.state")
    file(REMOVE_RECURSE "${fresh}" "${fresh}.sdist")
    unpack("${fresh}")
    apply_patches("${fresh}" "${patches}")
    synchronize("${fresh}" "${LLAMA_CPP_DIR}")
    file(REMOVE_RECURSE "${fresh}")
    if(NOT LLAMA_CPP_SOURCE_DIR)
        file(WRITE "${LLAMA_CPP_DIR}.state" "${state}")
    endif()
endif()
