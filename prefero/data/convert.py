"""From what a package carries to what transformers and our readers load: one function an item, run once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

# torch and transformers are imported where they are used: fetching a table of text needs neither


def smollm2(raw: Path, out: Path) -> None:
    """A 4-bit GGUF file to a clean transformers folder with bfloat16 safetensors.

    raw: folder with the one GGUF file. A model that transformers reads from GGUF is marked as quantised although its
    weights are not, and then refuses to be saved; so a fresh one is built from the cleaned config.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    (file,) = raw.glob("*.gguf")
    logging.disable_progress_bar()  # two bars of half a minute, in a log one endless line
    tokenizer = AutoTokenizer.from_pretrained(str(raw), gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(str(raw), gguf_file=file.name, dtype=torch.float32)
    logging.enable_progress_bar()
    unwanted = {
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "dtype",
        "torch_dtype",
        "transformers_version",
    }
    config = LlamaConfig(**{key: value for key, value in read.config.to_dict().items() if key not in unwanted})
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))


def copy(raw: Path, out: Path) -> None:
    """The files as they are (a folder that transformers loads already)."""
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(raw.iterdir()):
        shutil.copyfile(file, out / file.name)


def hhh(raw: Path, out: Path) -> None:
    """BIG-bench's four HHH task files to one JSONL of prompt, chosen, rejected and category.

    Raises ValueError for an example without exactly one right and one wrong answer.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    canary = ""
    for file in sorted(raw.glob("*.json")):
        task = json.loads(file.read_text(encoding="utf-8"))
        canary = task["canary"]
        for example in task["examples"]:
            answers = example["target_scores"]
            right, wrong = ([text for text, score in answers.items() if score == wanted] for wanted in (1, 0))
            if len(right) != 1 or len(wrong) != 1:
                raise ValueError(f"{file.name}: the example {example['input'][:60]!r} is not a pair of answers")
            prompt = f"Human: {example['input'].strip()}\n\nAssistant:"
            pair = {"prompt": prompt, "chosen": " " + right[0].strip(), "rejected": " " + wrong[0].strip()}
            rows.append({**pair, "category": file.stem})
    write_jsonl(out / "hhh.jsonl", rows)
    (out / "NOTICE.txt").write_text(f"For evaluation only, never to train on.\n{canary}\n", encoding="utf-8")


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line, UTF-8."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
