"""llama-cpp-python's own handler of pictures, as its users call it: handler.py CASE f16"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_chat_format import MTMDChatHandler
from worker import Case, Window, serve


class Handler:
    def __init__(self, case: Case, cache: str) -> None:
        self.case = case
        timed = case.windows[0]
        self.llama = Llama(
            case.settings["model"],
            chat_handler=MTMDChatHandler(case.settings["mmproj"], verbose=False, use_gpu=False),
            n_ctx=-(-(len(timed.tokens) + len(timed.continuation)) // 256) * 256,
            n_threads=case.settings["n_threads"],
            n_threads_batch=case.settings["n_threads"],
            flash_attn=True,
            verbose=False,
        )

    def turn(self) -> dict[str, Any]:
        first, second = map(_with_urls, self.case.settings["messages"])
        t0 = time.perf_counter()
        stream = self._chat(first)
        answer = next(stream)
        t1 = time.perf_counter()
        answer += "".join(stream)
        t2 = time.perf_counter()
        second[1]["content"] = answer.strip()
        t3 = time.perf_counter()
        stream = self._chat(second)
        next(stream)
        t4 = time.perf_counter()
        stream.close()
        return {
            "prefill_s": None,
            "first_token_s": t1 - t0,
            "decode_s": t2 - t1,
            "n_decode": len(self.llama.tokenize(answer.encode(), add_bos=False)),
            "second_s": t4 - t3,
            "kv_bytes": len(self.case.windows[0].tokens) * self.case.settings["bytes_per_cell"],
            "answer": answer,
        }

    def _chat(self, messages: list[dict[str, Any]]) -> Any:
        chunks = self.llama.create_chat_completion(
            messages, temperature=0.0, repeat_penalty=1.0, max_tokens=64, stream=True
        )
        return (t for chunk in chunks if (t := chunk["choices"][0]["delta"].get("content")))

    def logits(self, window: Window) -> np.ndarray:
        raise NotImplementedError("its cache is that of llama.py with f16")


def _with_urls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        message
        | {
            "content": [
                {"type": "image_url", "image_url": {"url": Path(part["image"]).as_uri()}}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ]
        }
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


if __name__ == "__main__":
    serve(Handler)
