# SPDX-License-Identifier: Apache-2.0

"""Tables of published figures and ours, written anew after each run."""

import json
from pathlib import Path

import pandas as pd
from anomalib.data.datamodules.image.visa import VISA_CATEGORIES

from ..files import write_file
from ..metrics import METRICS

MEAN = "mean of all"  # categories of the data set

# Image AUROC of the paper's authors, from the README of their code, and of anomalib, from the README of its Stfpm.
_MVTEC_AD = {
    "carpet": (0.964, 0.954),
    "grid": (0.982, 0.982),
    "leather": (0.951, 0.989),
    "tile": (0.982, 0.949),
    "wood": (0.996, 0.961),
    "bottle": (1.000, 0.979),
    "cable": (0.936, 0.838),
    "capsule": (0.893, 0.759),
    "hazelnut": (1.000, 0.999),
    "metal_nut": (0.983, 0.956),
    "pill": (0.951, 0.705),
    "screw": (0.895, 0.835),
    "toothbrush": (0.897, 0.997),
    "transistor": (0.939, 0.853),
    "zipper": (0.961, 0.645),
    MEAN: (0.955, 0.893),
}
# By data set, source, metric and category. The authors' PRO is the rescaled one. Neither of the two has figures for
# VisA; those here were measured by others.
PUBLISHED: dict[str, dict[str, dict[str, dict[str, float]]]] = {
    "MVTecAD": {
        "paper": {
            "image_AUROC": {category: paper for category, (paper, _) in _MVTEC_AD.items()},
            "pixel_AUROC": {MEAN: 0.970},
            "rescaled_PRO": {MEAN: 0.928},
        },
        "anomalib": {
            "image_AUROC": {category: anomalib for category, (_, anomalib) in _MVTEC_AD.items()},
            "pixel_AUROC": {MEAN: 0.951},
        },
    },
    "Visa": {"on record": {"image_AUROC": {MEAN: 0.833}}},
    "Folder": {},
}
ALL_CATEGORIES = {"MVTecAD": _MVTEC_AD.keys() - {MEAN}, "Visa": set(VISA_CATEGORIES), "Folder": set()}


def make_table(data: str, runs: pd.DataFrame) -> pd.DataFrame:
    """Put published figures and ours side by side.

    Args:
        data (str): The data set.
        runs (pd.DataFrame): One row for each run.

    Returns:
        pd.DataFrame: A row for each category, one for their mean, and one for the published mean, if there is one. The
            last has our figure only if we have all categories, each with what the metric needs. The columns of each
            metric are the published figures, our mean over the seeds, and the standard deviation over several seeds.
    """
    groups = runs.groupby("category")
    table = pd.DataFrame(index=groups.size().index)
    for metric in METRICS:
        for source, figures in PUBLISHED[data].items():
            if metric in figures:
                table[f"{metric} {source}"] = pd.Series(figures[metric])
        table[f"{metric} ours"] = groups[metric].mean()
        table[f"{metric} spread"] = groups[metric].std()
    means = table.drop(columns=table.filter(like=" spread").columns).mean()
    published = pd.Series(
        {
            f"{metric} {source}": figures[MEAN]
            for source, metrics in PUBLISHED[data].items()
            for metric, figures in metrics.items()
        }
    )
    if set(table.index) == ALL_CATEGORIES[data]:
        complete = table.filter(like=" ours").notna().all()
        published = pd.concat([published, means[complete.index[complete]]])
    table.loc[f"mean of these {len(groups)}"] = means
    if PUBLISHED[data]:
        table.loc[MEAN] = published
    table["seeds"] = groups["seed"].nunique().astype("Int64")
    table["masks"] = groups["masks"].all().astype("boolean")
    return table


def to_markdown(data: str, table: pd.DataFrame) -> str:
    """Format the table for people.

    Args:
        data (str): The data set.
        table (pd.DataFrame): See :func:`make_table`.

    Returns:
        str: Markdown, with notes on what the figures are and which are missing.
    """

    def cell(row: str, column: str) -> str:
        value, spread = table.loc[row, column], table.loc[row].get(column.replace(" ours", " spread"))
        if pd.isna(value):
            return "-"
        if column == "seeds":
            return str(value)
        return f"{value:.3f}" + (f" ± {spread:.3f}" if column.endswith(" ours") and pd.notna(spread) else "")

    columns = [name for name in table.columns if not name.endswith(" spread") and name != "masks"]
    heads = [f"{METRICS[name.split(' ', 1)[0]]}, {name.split(' ', 1)[1]}" if " " in name else name for name in columns]
    lines = [f"# {data}", "", f"| category | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(cell(row, column) for column in columns)} |" for row in table.index]
    notes = ["256x256, raw scores. PRO, rescaled: the authors' measure, biased upward; AUPRO (0.3) is the usual one."]
    if table[[f"{metric} spread" for metric in METRICS]].notna().any(axis=None):
        notes.append("±: standard deviation over the seeds.")
    without_masks = table.index[table["masks"] == False]  # noqa: E712  # the means have NA, which is neither
    if len(without_masks):
        notes.append(f"Without masks, hence without pixel metrics and not in their means: {', '.join(without_masks)}.")
    return "\n".join([*lines, "", *notes, ""])


def write_tables(data: str, output: Path) -> None:
    """Write ``results.md``, ``results.csv`` and ``results.json`` from the runs that have finished so far.

    Args:
        data (str): The data set.
        output (Path): Folder of the runs.
    """
    runs = pd.DataFrame([json.loads(file.read_text()) for file in sorted(output.glob("*/seed_*/run.json"))])
    if runs.empty:
        return
    runs[list(METRICS)] = runs[list(METRICS)].astype(float)  # None where no category has masks
    table = make_table(data, runs)
    write_file(output / "results.md", to_markdown(data, table))
    write_file(output / "results.csv", table.to_csv(index_label="category"))
    write_file(output / "results.json", table.to_json(orient="index", indent=2))
