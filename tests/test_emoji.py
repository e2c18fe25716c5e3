"""The suite of emoji: what docs/evaluation.md prepares, measured from one file, on a cut of the pack and random models."""

import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from test_evaluation import write_tar
from training_utils import ROOT

import hfclip_cli
from hfclip import HFCLIPConfig, HFCLIPImageProcessor, HFCLIPModel, HFCLIPProcessor, HFCLIPTokenizer
from training.command import load_yaml


SUITE = ROOT / "src" / "hfclip" / "evaluation" / "suites" / "emoji.yaml"
WIDTHS = (4, 8, 16)


def cut(pack: Path, out: Path) -> None:
    """The images of a few names, every 30th, of each part of the pack."""
    (out / "train").mkdir(parents=True)
    (out / "names.json").write_bytes((pack / "names.json").read_bytes())
    names = (pack / "seen_noto" / "classnames.txt").read_text(encoding="utf-8").splitlines()[::30]
    for part in ("train", "seen_noto/test", "seen_fluent/test", "seen_line/test", "unseen/test"):
        folder, files = out / part, {}
        folder.mkdir(parents=True, exist_ok=True)
        known = (pack / part).parent / "classnames.txt"
        labels = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
        kept = labels[::10] if part.startswith("unseen") else names
        for shard in sorted((pack / part).glob("*.tar")):
            with tarfile.open(shard) as tar:
                members = {member.name: tar.extractfile(member).read() for member in tar}
            for key in sorted({name.split(".")[0] for name in members}):
                sample = {name.split(".")[1]: data for name, data in members.items() if name.startswith(f"{key}.")}
                name = labels[int(sample["cls"])] if labels else json.loads(sample["json"])["concept"]
                if name in kept:
                    sample |= {"cls": str(kept.index(name)).encode()} if labels else {}
                    files |= {f"{shard.stem}-{key}.{ending}": data for ending, data in sample.items()}
        write_tar(folder / "0.tar", files)
        (folder / "nshards.txt").write_text("1")
        if labels:
            (folder.parent / "classnames.txt").write_text("\n".join(kept), encoding="utf-8")
            (folder.parent / "zeroshot_classification_templates.txt").write_text("{c}\na picture of {c}")


def save_models(folder: Path) -> None:
    """The recipe's model in three widths, with random weights."""
    recipe = load_yaml("emoji")["model"]["config"]
    tokenizer = HFCLIPTokenizer.train_new_from_iterator(["a picture of a face with a cat"] * 2, 520)
    ids = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    for seed, width in enumerate(WIDTHS):
        torch.manual_seed(seed)
        config = HFCLIPConfig(
            projection_dim=recipe["projection_dim"],
            vision_config={**recipe["vision_config"], "stem_width": width},
            text_config={**recipe["text_config"], **ids},
        )
        name = folder / "runs" / ("emoji" if width == WIDTHS[-1] else f"emoji-{width}") / "model"
        HFCLIPModel(config).save_pretrained(name)
        HFCLIPProcessor(HFCLIPImageProcessor(size=64), tokenizer).save_pretrained(name)


@pytest.mark.slow
def test_one_file_measures_everything(data_dir, tmp_path, monkeypatch, capsys):
    cut(data_dir / "emoji", tmp_path / "data" / "emoji")
    save_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.split("\n## A small ImageNet")[1].split("\n## ")[0]
    exec(re.search(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)[1], {})
    (tmp_path / "src").symlink_to(ROOT / "src")  # the suite is run from the clone
    suite = yaml.safe_load(SUITE.read_text(encoding="utf-8"))
    assert suite["runs"].pop()["task"] == "scaling"  # errors of random models may be equal, and have no exponent
    Path("suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    for words in (["evaluate", "suite.yaml"], ["report", "results/emoji"]):
        monkeypatch.setattr(sys, "argv", ["hfclip", *words])
        hfclip_cli.main()
    said = capsys.readouterr().out
    tasks = {run["task"] for run in suite["runs"]}
    assert {line.split("\t")[0] for line in said.splitlines() if "\t" in line} >= tasks
    assert "seen_fluent_effective_robustness" in said
    assert (tmp_path / "results/emoji/report/report.html").is_file()
