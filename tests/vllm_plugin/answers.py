"""What vLLM answers, in a process of its own, which it changes: python answers.py '{"model": ..., "prompts": [[ids]]}'.

Prints a line of JSON: a list of the tokens of each answer.
"""

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams

    given = json.loads(sys.argv[1])
    llm = LLM(
        given["model"], dtype="float32", skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 26, max_model_len=128,
        **given["options"],
    )  # fmt: skip
    asked = SamplingParams(temperature=0, max_tokens=given["tokens"], ignore_eos=True, detokenize=False)
    found = llm.generate([{"prompt_token_ids": ids} for ids in given["prompts"]], asked, use_tqdm=False)
    print("\n" + json.dumps([list(answer.outputs[0].token_ids) for answer in found]))


if __name__ == "__main__":
    main()
