"""Makes the tables of jaxlm/cost/PLAN.md: compiles each step that they have, and keeps what it has found in a folder.

    JAX_OPTIMIZATION_LEVEL=O1 python scripts/plan_table.py plans/     # an hour; continues where it was stopped

Needs the extra `tpu`. Without O1 it takes several times as long.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jaxlm import config as configs
from jaxlm.cost import roofline, search
from jaxlm.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
SHAPES = {  # of 8, 64 and 256 chips
    "v4": ("2x2x2", "4x4x4", "4x8x8"),
    "v5e": ("2x4", "8x8", "16x16"),
    "v5p": ("2x2x2", "4x4x4", "4x8x8"),
    "v6e": ("2x4", "8x8", "16x16"),
}
# Samples of a chip, and remat: the best that was found of what fits.
BEST = {"gpt_base": {"v5e": (8, "dots"), "": (16, "none")}, "mlm_base": {"v5e": (16, "dots"), "": (32, "none")}}
# Each size on a topology where it fits, as its file has it.
SIZES = {
    "gpt_350m": "v5e:4x4",
    "gpt_1b": "v5e:4x8",
    "gpt_3b": "v5e:8x8",
    "gpt_7b": "v5p:4x4x8",
    "mlm_large": "v5e:2x4",
}


def planned(folder: Path, config_name: str, topology: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of a step as JSON, from the folder if it is there."""
    words = [str(value) for value in values.values()]
    path = folder / ("-".join([config_name, topology.replace(":", "-"), *words]) + ".json")
    if not path.exists():
        config, _ = configs.load(["--config", str(CONFIGS / f"{config_name}.toml")])
        config = search.with_vocab_size(config)
        for name, value in values.items():
            config = configs.replace(config, name, value)
        print(f"compiling {path.stem}", file=sys.stderr, flush=True)
        found = roofline.plan(config, topology, search.measure(config, topology))
        path.write_text(json.dumps(dataclasses.asdict(found)))
    return json.loads(path.read_text())


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells(found: dict[str, Any]) -> list[str]:
    """Return what both tables tell of a plan."""
    if found["step"]["too_large"]:
        return ["does not fit", *[""] * 5]
    times = [f"{1e3 * found[name]:.1f}" for name in ("compute_s", "memory_s", "interconnect_s")]
    memory = f"{found['n_bytes'] / 1e9:.1f} of {found['limit'] / 1e9:.1f}"
    return [memory, *times, found["bound"], f"{found['utilization']:.0%}"]


def mesh(found: dict[str, Any]) -> str:
    return " x ".join(f"{axis} {n}" for axis, n in found["step"]["mesh"].items() if n > 1)


def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    heads = ["GB", "compute", "memory", "links", "bound", "utilization"]
    lines = [row(["configuration", "topology", "chips", "batch", "remat", *heads]), row(["---"] * 11)]
    for name, settings in BEST.items():
        for topology in (f"{kind}:{shape}" for kind, shapes in SHAPES.items() for shape in shapes):
            n_chips = roofline.named(topology)[1]
            per_chip, remat = settings.get(topology.partition(":")[0], settings[""])
            n = per_chip * n_chips
            values = {"train.batch_size": n, "train.accumulate": 1, "model.remat": remat, "model.dropout": 0.0}
            try:
                found = planned(folder, name, topology, values)
            except UserError as error:
                print(f"{name} on {topology}: {error}", file=sys.stderr)
                continue
            lines.append(row([f"`{name}`", topology, str(n_chips), f"{n:,}", remat, *cells(found)]))
    lines += ["", row(["configuration", "topology", "mesh", "batch", "remat", *heads, "days, chip-hours"])]
    lines.append(row(["---"] * 12))
    for name, topology in SIZES.items():
        try:
            found = planned(folder, name, topology, {})
        except UserError as error:
            print(f"{name} on {topology}: {error}", file=sys.stderr)
            continue
        batch = f"{found['batch_size']} x {found['accumulate']}"
        whole = f"{found['hours'] / 24:.1f}, {found['chip_hours']:,.0f}"
        lines.append(row([f"`{name}`", topology, mesh(found), batch, found["remat"], *cells(found), whole]))
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
