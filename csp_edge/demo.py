"""csp-edge demo: conversations about several pictures, over the full and over a pruned cache."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csp_edge.errors import OptionError
from csp_edge.images import load_image
from csp_edge.kept_picture import kept_picture
from csp_edge.policies import CSP, Full
from csp_edge.results import CacheFigures, ChatResult
from csp_edge.terminal import Progress, answer, write
from csp_edge.vlm import EdgeVLM

PICTURES = sorted((Path(__file__).parent / "pictures").glob("*.png"))
# Questions in the words that the model knows, and what is right. Each conversation begins with all
# pictures. A second question is about a picture of the first one, but for the very last.
CONVERSATIONS = (
    {"Which image shows the blue star?": "2", "What color is the star in image 2?": "blue"},
    {"What is written in image 4?": "MILK"},
    {"How many fish are in image 6?": "4", "Which image shows the boat?": "6"},
    {
        "What is left of the triangle in image 5?": "dog",
        "What color is the triangle in image 5?": "green",
    },
    {
        "What changed from image 10 to image 11?": "apple became pizza",
        "What is in image 10?": "key, apple, yellow diamond",
    },
    {"Where is the rocket from image 7 to image 9?": "top left, center, top right"},
    {
        "What is in image 3?": "green cross, orange square, purple ring",
        "Which image shows the cat?": "1",
    },
)
BUDGET = 0.2


def demo(png: Path) -> None:
    """Hold the conversations over both caches, print them with figures, and save what was kept.

    Raises:
        OptionError: the picture can't be saved.
        KeyboardInterrupt: Ctrl-C.
        CspEdgeError: the model can't run here.
    """
    progress = Progress()
    first = next(iter(CONVERSATIONS[0]))
    # the first run of all waits for the disk, which is not to be compared
    with _load(Full(), progress) as vlm:
        answer(vlm, progress, lambda piece: None, first, PICTURES)

    print(f"{len(CONVERSATIONS)} conversations, each about the same {len(PICTURES)} pictures")
    print("\nOver the full cache")
    full = _converse(Full(), progress)
    print(f"\nPruned to {BUDGET:.0%} once the first 16 tokens of an answer are there:")
    print("what follows, and every later question, is answered from what was kept")
    pruned = _converse(CSP(budget=BUDGET), progress)
    print()
    _compare(full, pruned)
    _save(pruned[0].cache, first, png)
    print(f"\nThe patches kept after the first question: {png}")


def _load(cache: CSP | Full, progress: Progress) -> EdgeVLM:
    with progress:
        return EdgeVLM.demo(cache=cache, progress=progress)


def _converse(cache: CSP | Full, progress: Progress) -> list[ChatResult]:
    results = []
    with _load(cache, progress) as vlm:
        for questions in CONVERSATIONS:
            print()
            vlm.reset()
            messages: list[dict[str, Any]] = []
            pictures: list[dict[str, Any]] = [{"type": "image", "image": p} for p in PICTURES]
            for question, right in questions.items():
                text = {"type": "text", "text": question}
                messages.append({"role": "user", "content": [*pictures, text]})
                pictures = []
                write(f"  {question}\n    ")
                result = answer(vlm, progress, write, messages)
                if result.finish_reason == "cancelled":
                    raise KeyboardInterrupt
                print("" if result.text == right else f"   (wrong: {right})")
                messages.append({"role": "assistant", "content": result.text})
                results.append(result)
    return results


def _compare(full: Sequence[ChatResult], pruned: Sequence[ChatResult]) -> None:
    print(f"{'':<34}{'full':>8}{'pruned':>8}")
    for (name, value), (_, other) in zip(_figures(full), _figures(pruned), strict=True):
        print(f"{name:<34}{value:>8}{other:>8}")


def _figures(results: Sequence[ChatResult]) -> list[tuple[str, str]]:
    caches = [result.cache for result in results]
    follow_ups = [result for result in results if result.usage.cached_tokens]
    decode_s = sum(result.timings.decode_s for result in results)
    n_decoded = sum(r.timings.decode_s * r.timings.tokens_per_second for r in results)
    rights = [right for questions in CONVERSATIONS for right in questions.values()]
    n_right = sum(r.text == right for r, right in zip(results, rights, strict=True))
    return [
        ("KV cells, first question", f"{caches[0].cells_after}"),
        ("KV cells, at most", f"{max(cache.cells_after for cache in caches)}"),
        ("KV MiB, first question", f"{caches[0].bytes_after / 2**20:.2f}"),
        ("KV MiB, at most", f"{max(cache.bytes_after for cache in caches) / 2**20:.2f}"),
        ("first token, first question, ms", _ms(results[:1])),
        ("first token, follow-ups, ms", _ms(follow_ups)),
        ("tokens/s", f"{n_decoded / decode_s:.0f}"),
        ("right answers", f"{n_right}/{len(results)}"),
    ]


def _ms(results: Sequence[ChatResult]) -> str:
    return f"{1000 * statistics.median(result.timings.first_token_s for result in results):.0f}"


def _save(cache: CacheFigures, question: str, png: Path) -> None:
    page = kept_picture(
        [load_image(path) for path in PICTURES],
        cache.patches(),
        title=f"{cache.cells_after} of {cache.cells_before} cells kept: {question}",
    )
    try:
        page.save(png, "PNG")
    except OSError as error:
        raise OptionError(f"{png}: can't be written: {error.strerror}") from None
