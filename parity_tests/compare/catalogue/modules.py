"""What one module may make of its input: activation functions, norms, linear layers, adapters."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from parity_tests.compare.catalogue.evidence import NEAR, Cause, Formula, Rule, distance, explained, size_of_difference
from parity_tests.compare.catalogue.place import Divergence

_erf = np.vectorize(math.erf, otypes=[float])

ACTIVATIONS: dict[tuple[str, str], Callable[[np.ndarray], np.ndarray]] = {
    ("GELU", "by erf"): lambda x: 0.5 * x * (1 + _erf(x / 2**0.5)),
    ("GELU", "by tanh"): lambda x: 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    ("GELU", "by sigmoid(1.702 x)"): lambda x: x / (1 + np.exp(-1.702 * x)),
    ("ReLU", ""): lambda x: np.maximum(x, 0),
    ("SiLU", ""): lambda x: x / (1 + np.exp(-x)),
    ("tanh", ""): np.tanh,
    ("sigmoid", ""): lambda x: 1 / (1 + np.exp(-x)),
    ("leaky ReLU", ""): lambda x: np.where(x > 0, x, 0.01 * x),
    ("ELU", ""): lambda x: np.where(x > 0, x, np.expm1(x)),
    ("squared ReLU", ""): lambda x: np.maximum(x, 0) ** 2,
}
EPSILONS = (1e-5, 1e-6, 1e-12, 1e-3, 1e-8, 1e-7, 1e-4, 0.0)
LORA_SCALES = (0, 1, 2, 3, 4, 8, 16, 32, 0.5, 1.5, 3 / 2**0.5, 0.25, 1 / 3, 2**0.5)


def activations(x: np.ndarray, of: str = "") -> Iterator[Formula]:
    """Yield what activation functions make of an array; `of` says of which."""
    for (name, how), function in ACTIVATIONS.items():
        choices = {"activation function": name, "gelu": how, "module skipped": of}
        said = " ".join(text for text in ("computes", name, how, of) if text)
        yield Formula(choices, function(x), "gelu" if how else "activation function", said)


def norms(x: np.ndarray, weight: np.ndarray | None, bias: np.ndarray | None) -> Iterator[Formula]:
    """Yield what norms of x over its last axis may be: the usual ones, and each with one thing otherwise."""
    scale = 1.0 if weight is None else weight
    shift = 0.0 if bias is None else bias
    for is_rms in (False, True):
        apart = x if is_rms else x - x.mean(-1, keepdims=True)
        square = (apart**2).mean(-1, keepdims=True)
        n = x.shape[-1]
        for epsilon in EPSILONS:
            usual = {"RMS norm": "takes no mean off" if is_rms else "takes the mean off"}
            usual |= {"epsilon": f"has epsilon {epsilon:g}", "biased variance": "", "norm scale": ""}
            root = np.sqrt(square + epsilon)
            yield Formula(usual, apart / root * scale + shift)
            outside = {"epsilon": f"adds epsilon {epsilon:g} to the root"}
            yield Formula(usual | outside, apart / (np.sqrt(square) + epsilon) * scale + shift, "epsilon")
            over = {"biased variance": "has a variance over n - 1"}
            yield Formula(usual | over, apart / np.sqrt(square * n / (n - 1) + epsilon) * scale + shift, *over)
            if weight is not None:
                scaled = apart * scale
                before = scaled / np.sqrt((scaled**2).mean(-1, keepdims=True) + epsilon) + shift
                for text, y in (
                    ("has no scale", apart / root + shift),
                    ("has no shift", apart / root * scale),
                    ("scales by 1 + weight", apart / root * (1 + scale) + shift),
                    ("scales before it divides", before),
                ):
                    yield Formula(usual | {"norm scale": text}, y, "norm scale")
    yield Formula({"norm missing": "does not normalize"}, x, "norm missing")


def linear(d: Divergence, own: dict[str, np.ndarray], x: np.ndarray, bias: np.ndarray | None) -> Iterator[Formula]:
    """Yield what a linear layer may make of x."""
    weight = next(w for name, w in own.items() if w.ndim == 2 and not name.startswith("lora"))
    # Flax stores a kernel [in, out], PyTorch and Equinox a weight [out, in].
    is_kernel = not d.a.record.framework.startswith("torch") and "kernel" in own
    for w, is_turned in ((weight, False), (weight.T, True)):
        if w.shape != (d.x.shape[-1], x.shape[-1]):
            continue
        product = x @ w.T
        is_usual = is_turned == is_kernel or w.shape[0] != w.shape[1]
        of = {"transposed kernel": "multiplies with its weight" + " transposed" * (not is_usual)}
        kind = "" if is_usual else "transposed kernel"
        if bias is None:
            yield Formula(of, product, kind)
            continue
        for text, n in (("", 1), ("adds no bias", 0), ("adds its bias twice", 2)):
            yield Formula(of | {"bias": text}, product + n * bias, kind if n == 1 else "bias")
        product = product + bias
    lora_a, lora_b = (next((w for name, w in own.items() if key in name.lower()), None) for key in ("lora_a", "lora_b"))
    if lora_a is not None and lora_b is not None:
        lora_a = lora_a if lora_a.shape[-1] == x.shape[-1] else lora_a.T
        lora_b = lora_b if lora_b.shape[0] == product.shape[-1] else lora_b.T
        for scale in LORA_SCALES:
            added = product + scale * x @ lora_a.T @ lora_b.T
            yield Formula({"LoRA scale": f"scales its adapter by {scale:.4g}"}, added, "LoRA scale")


def of_module(d: Divergence, module: str) -> Iterator[Formula]:
    """Yield what a module may make of what it gets, by its parameters."""
    x, own = d.input(module), d.parameters(module)
    if x is None:
        return
    bias = next((w for name, w in own.items() if w.ndim == 1 and ("bias" in name or name in ("b", "beta"))), None)
    scale = next((w for w in own.values() if w.ndim == 1 and w is not bias), None)
    is_linear = any(w.ndim == 2 and x.shape[-1] in w.shape and not n.startswith("lora") for n, w in own.items())
    if is_linear:
        yield from linear(d, own, x, bias)
    elif x.shape == d.x.shape and (scale is not None or bias is not None):
        yield from norms(x, scale, bias)
    elif x.shape == d.x.shape:
        yield from activations(x)


def one_module(d: Divergence) -> Iterator[Cause]:
    """The module that makes the output is another one than it should be."""
    if d.first.kind == "activation" and "#" not in d.name:
        yield from explained(d.x, d.y, of_module(d, d.maker), d.where)


def norm_left_out(d: Divergence) -> Iterator[Cause]:
    """A norm of the model turns the array of one side into that of the other."""
    near = NEAR * size_of_difference(d.x, d.y)
    modules = sorted({name.rpartition(".")[0] for name in d.pairs if "norm" in name.lower() or "ln" in name.lower()})
    shown = [x for x in d.modules if is_norm(x)]
    for module in dict.fromkeys([*shown, *modules]):
        vectors = {name: w for name, w in d.parameters(module).items() if w.shape == d.x.shape[-1:]}
        bias = next((w for name, w in vectors.items() if "bias" in name or name == "beta"), None)
        scale = next((w for w in vectors.values() if w is not bias), None)
        for which, one, two in (("B", d.x, d.y), ("A", d.y, d.x)):
            if vectors and any(f.kind == "" and distance(f.array, one) < near for f in norms(two, scale, bias)):
                yield Cause("norm missing", f"{d.where}: {which} does not apply {module}", 0.92)
                return


def is_norm(module: str) -> bool:
    """Return whether a module is a norm, by its name."""
    last = module.rpartition(".")[2].lower()
    return "norm" in last or last.startswith("ln")


RULES: tuple[Rule, ...] = (one_module, norm_left_out)
