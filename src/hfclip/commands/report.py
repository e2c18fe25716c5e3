"""Makes a report of results: tables beside the paper's numbers, and plots.

    hfclip report results                         # results/report/report.html, .md, .csv, plots/
    hfclip report results --out report --card clip-b32

The page holds all that it shows and may be sent as one file. --card writes the headlines of a model's results into the
card of its folder (README.md, `model-index`), where the Hub finds them.
"""

import argparse
from pathlib import Path

from huggingface_hub import ModelCard

from hfclip.errors import UsageError, as_usage_error, run
from hfclip.evaluation.records import read_all
from hfclip.evaluation.report import as_eval_results, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS", help="the folder that `hfclip evaluate --out` made")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the report (default: RESULTS/report)")
    parser.add_argument("--card", type=Path, metavar="MODEL", help="model folder whose card gets its results")
    options = parser.parse_args()
    print(write_report(options.results, options.out or options.results / "report"))
    if options.card:
        print(write_card(options.results, options.card))


def write_card(results: Path, folder: Path) -> Path:
    """Puts the results of the model of `folder` into its card; earlier ones of the same data and metric are replaced.

    Raises:
        UsageError: there is no card, or no result of this model.
    """
    path, names = folder / "README.md", {str(folder), folder.as_posix().rstrip("/"), folder.name}
    own = [record for record in read_all(results) if record.result["model"].get("name") in names]
    if not own:
        raise UsageError(f"{results}: found no result of a model named {folder}, expected one at least.")
    with as_usage_error(path):
        card = ModelCard.load(path)
        found = as_eval_results(own)
        kept = [
            old for old in card.data.eval_results or () if not any(old.is_equal_except_value(new) for new in found)
        ]
        card.data.eval_results = [*kept, *found]
        card.data.model_name = card.data.model_name or folder.name
        card.save(path)
    return path


if __name__ == "__main__":
    run(main)
