"""EdgeVLM(memory=) under the operating system's own limit, which kills what goes beyond it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from csp_edge import EdgeVLM
from csp_edge.errors import MemoryLimitError

WORK = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from csp_edge import EdgeVLM
from csp_edge.eval.suite import suite
[sample] = suite(["list"], n_samples=1, n_images=[16])
with EdgeVLM.demo(memory=sys.argv[2], recall=sys.argv[3] == "recall", n_threads=1) as vlm:
    messages = sample.messages()
    for turn in sample.turns:
        print(vlm.chat(messages).text)
        messages = sample.messages([turn.answer])
    print(vlm.engine.max_cells)
"""
TOO_MUCH = (
    "numbers = bytearray(2 * int(sys.argv[2]))\nnumbers[::4096] = b'x' * len(numbers[::4096])"
)


def limit_file(group: Path) -> Path:
    v1, v2 = group / "memory.limit_in_bytes", group / "memory.max"
    return v2 if v2.exists() else v1


@pytest.fixture
def limited():
    """Runs Python code with a group of its own, of so many bytes."""
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        group = root / f"csp-edge-{os.getpid()}"
        try:
            group.mkdir()
            limit_file(group).write_text(str(2**30))
            break
        except OSError:
            continue
    else:
        pytest.skip("no memory cgroup of one's own here")

    def run(code: str, n_bytes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        limit_file(group).write_text(str(n_bytes))
        return subprocess.run(
            [sys.executable, "-c", code, group, str(n_bytes), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
        )

    yield run
    group.rmdir()


def least(**options) -> int:
    with pytest.raises(MemoryLimitError) as error:
        EdgeVLM.demo(memory="10 MB", **options)
    found = re.search(r'memory="(\d+)MiB" or more', str(error.value))
    assert found
    return int(found[1]) * 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="needs cgroups")
@pytest.mark.parametrize("recall", ["recall", "none"])
def test_a_chat_finishes_within_the_memory_it_was_given(limited, recall):
    for n_bytes in (least(recall=recall == "recall"), 110 * 2**20):
        done = limited(WORK, n_bytes, recall)
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(done.stdout.splitlines()) == 4
    # what takes more does not
    assert limited(
        WORK.replace("from csp_edge", TOO_MUCH + "\nfrom csp_edge", 1), n_bytes, recall
    ).returncode
