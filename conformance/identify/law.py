"""conformance, identify: the law of the weights. Which fields give the weights of the experts that were chosen.

Whatever chose them, the ids are known: a weight is then a function of the logits. Within a token the norm and the
scale cancel, so that ratios tell the score function; what is left over tells norm, eps and scale. Numbers are fitted,
then rounded to those that people write.

Legend: T tokens, C columns, K top_k, E choices, S shared experts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.identify.box import Question
from moe_ref import UNUSED, RouterSpec
from moe_ref.routing import gather, scale_logits, score, softmax
from moe_ref.specs.families import FAMILIES

FITS = 4e-5
"""Relative error of a weight that float32 explains, for a first look; the bounds of the judge decide later."""
SMALLEST = 1e-30
BASES: tuple[dict[str, Any], ...] = (
    {"score_func": "softmax"},
    {"score_func": "sigmoid"},
    {"score_func": "sqrtsoftplus"},
    {"score_func": "softmax", "score_over": "selected"},
)
RELU: dict[str, Any] = {"score_func": "relu"}
"""A base too, where tokens have different numbers of experts: scores of 0 are not ranked."""
NORMS = (1.0, 2.0, 3.0, 0.5, 4.0)
EPS_GRID = 10.0 ** np.arange(-30, 0.51, 0.25)
DECIMALS = sorted({m * 10.0**e for e in range(-24, 4) for m in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 7.5, 8)})


@dataclass(frozen=True, kw_only=True)
class Law:
    """Fields that give the weights, and how far they are off."""

    fields: dict[str, Any]
    residual: float
    """Of the logarithm of a weight: the 90th percentile."""
    worst: float
    """The same: the largest."""

    @property
    def complexity(self) -> int:
        return len(self.fields)


@dataclass(kw_only=True)
class Data:
    """Weights that were observed with learned factors of 1. What was skipped, or underflows, is left out."""

    logits_TE: np.ndarray
    shared_TS: np.ndarray
    """Logits of the shared experts."""
    ids_TK: np.ndarray
    weights_TK: np.ndarray
    num_experts: int
    fits: float = FITS
    """Relative error of a weight that its dtype explains."""
    smallest: float = SMALLEST
    used_TK: np.ndarray = field(init=False)

    def __post_init__(self):
        held_TK = (self.ids_TK != UNUSED) & (self.ids_TK < self.num_experts)
        self.used_TK = held_TK & (self.weights_TK > self.smallest)

    @classmethod
    def of(cls, questions: Sequence[Question], num_choices: int, num_experts: int) -> "Data":
        logits_TC = np.concatenate([each.logits_TC for each in questions])
        return cls(
            logits_TE=logits_TC[:, :num_choices],
            shared_TS=logits_TC[:, num_choices:],
            ids_TK=np.concatenate([each.expert_ids_TK for each in questions]),
            weights_TK=np.concatenate([each.weights_TK for each in questions]),
            num_experts=num_experts,
        )

    def raw(self, fields: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the chosen, (T, K), and of the shared experts, (T, S), before norm and scale."""
        spec = RouterSpec(
            num_experts=self.logits_TE.shape[1],
            top_k=1,
            select_by="logit",
            selector="threshold" if fields["score_func"] == "relu" else "top_k",
            **{name: value for name, value in fields.items() if name in SHAPE},
        )
        scaled_TE = scale_logits(self.logits_TE, spec)
        if spec.score_over == "selected":
            logits_TK = np.where(self.ids_TK == UNUSED, -np.inf, gather(scaled_TE, self.ids_TK))
            raw_TK = softmax(np.where((self.ids_TK == UNUSED).all(axis=-1, keepdims=True), 0, logits_TK))
        else:
            raw_TK = gather(score(scaled_TE, spec), self.ids_TK)
        return raw_TK, score(scale_logits(self.shared_TS, spec), spec) if self.shared_TS.size else self.shared_TS


SHAPE = ("score_func", "score_over", "logit_scale", "logit_softcap")


def rankings(fields: dict[str, Any]) -> tuple[str, ...]:
    """What a choice may rank under the law of these fields: scores or logits; logits where scores come after it."""
    return ("logit",) if fields.get("score_over") == "selected" else ("score", "logit")


def laws(data: Data) -> list[Law]:
    """What explains the weights, the best first; several where they explain them alike."""
    if not data.used_TK.any():
        return [Law(fields={}, residual=np.inf, worst=np.inf)]
    bases = (*BASES, RELU) if (data.ids_TK == UNUSED).any() else BASES
    found = [law for base in bases for law in _laws_of(data, base)]
    best, fits = min(law.residual for law in found), data.fits
    near = [law for law in found if law.residual <= max(fits, 2 * best)]
    return sorted(near, key=lambda law: (law.worst > fits, law.complexity if best <= fits else law.residual))


def _laws_of(data: Data, base: dict[str, Any]) -> Iterator[Law]:
    if data.ids_TK.shape[1] > 1:
        shape, _ = _shape(data, base, by_token=True)
        yield from _norms(data, shape)
        return
    shape, _ = _shape(data, base, by_token=False)
    yield from (law for law in _norms(data, shape) if "route_norm" not in law.fields)
    # One weight over itself does not show its score.
    yield from (law for law in _norms(data, base) if "route_norm" in law.fields)


# the shape: score function, scale and cap of the logits


def _shape(data: Data, base: dict[str, Any], *, by_token: bool) -> tuple[dict[str, Any], float]:
    """The base with logit_scale and logit_softcap, as simple as the ratios of weights allow."""

    def off(fields: dict[str, Any]) -> np.ndarray:
        raw_TK, _ = data.raw(fields)
        return _centred(_log_over(raw_TK, data), data.used_TK, by_token)

    def made(x: np.ndarray) -> dict[str, Any]:
        names = ("logit_scale", "logit_softcap")
        return base | dict(zip(names, np.exp(np.clip(x, -6, 6)).tolist(), strict=False))

    best, residual = base, _worst(off(base))
    for starts in (([0.0], [-2.0]), ([0.0, 0.0], [0.0, 1.5], [0.0, 3.5], [1.0, 0.5])):
        if residual <= data.fits:
            break
        for start in starts:
            x = _gauss_newton(lambda x: off(made(x)), np.array(start))
            found = _rounded(made(x), lambda fields: _worst(off(fields)), data.fits)
            if found[1] < 0.3 * residual:
                best, residual = found
    return best, residual


def _log_over(raw_TK: np.ndarray, data: Data) -> np.ndarray:
    with np.errstate(divide="ignore"):
        log_TK = np.log(np.maximum(raw_TK, 1e-300)) - np.log(np.maximum(data.weights_TK, SMALLEST))
    return np.where(data.used_TK, log_TK, np.nan)


def _centred(log_TK: np.ndarray, used_TK: np.ndarray, by_token: bool) -> np.ndarray:
    """The logarithms less their mean: of each token, or of all."""
    if not by_token:
        return (log_TK - np.nanmedian(log_TK))[used_TK]
    count_T1 = used_TK.sum(axis=-1, keepdims=True)
    mean_T1 = np.where(used_TK, log_TK, 0).sum(axis=-1, keepdims=True) / np.maximum(count_T1, 1)
    return (log_TK - mean_T1)[used_TK & (count_T1 > 1)]


def _worst(off: np.ndarray) -> float:
    return float(np.quantile(np.abs(off), 0.9)) if off.size else 0.0


def _gauss_newton(residual: Callable[[np.ndarray], np.ndarray], x: np.ndarray, steps: int = 15) -> np.ndarray:
    """Least squares from a start; a step that does not help is halved."""
    value = residual(x)
    for _ in range(steps):
        slope = np.stack([(residual(x + 1e-5 * unit) - value) / 1e-5 for unit in np.eye(len(x))], axis=-1)
        if not np.isfinite(slope).all() or not value.size:
            return x
        step = np.clip(-np.linalg.lstsq(slope, value, rcond=None)[0], -1, 1)
        for _ in range(8):
            tried = residual(x + step)
            if np.square(tried).sum() < np.square(value).sum():
                break
            step = step / 2
        else:
            return x
        x, value = x + step, tried
        if np.abs(step).max() < 1e-10:
            break
    return x


# numbers that people write


def _written(name: str) -> list[float]:
    """Values of a field in the table of families."""
    specs = [spec for family in FAMILIES.values() for spec in (family.router, family.tiny)]
    return sorted({value for spec in specs if (value := getattr(spec, name))})


def near_numbers(name: str, value: float, tolerance: float) -> list[float]:
    """Numbers that people write near a measured one, the nearest of each sort first: families, decimals, 1 / n."""
    sorts = [_written(name), [1 / n for n in range(1, 33)], [n**-0.5 for n in range(1, 513)], DECIMALS]
    digits = [float(f"{value:.{n}g}") for n in (2, 3, 4)]
    found = [min(sort, key=lambda each: abs(each - value), default=value) for sort in sorts]
    return [each for each in (*found[:1], *found[3:], *digits, *found[1:3]) if abs(each / value - 1) <= tolerance]


def _rounded(
    fields: dict[str, Any], residual: Callable[[dict[str, Any]], float], fits: float
) -> tuple[dict[str, Any], float]:
    """The fields with numbers that people write, where these explain as much."""
    own, tolerance = residual(fields), max(1e-3, fits)
    for name in ("logit_softcap", "logit_scale", "norm_p", "norm_eps", "route_scale"):
        for near in near_numbers(name, fields[name], tolerance) if fields.get(name) else ():
            tried = fields | {name: near}
            if (off := residual(tried)) <= max(1.5 * own, fits / 4):
                fields, own = tried, off
                break
    return {name: value for name, value in fields.items() if not (name == "logit_scale" and value == 1)}, own


# what is left over: norm, eps, scale


def _norms(data: Data, shape: dict[str, Any]) -> Iterator[Law]:
    """A constant factor; or one over a norm, of some order, with some eps."""
    raw_TK, shared_TS = data.raw(shape)
    log_TK = _log_over(raw_TK, data)

    def off(fields: dict[str, Any]) -> np.ndarray:
        divisor_T = _divisor(raw_TK, shared_TS, fields)
        return (log_TK - np.log(divisor_T)[:, None] + np.log(fields["route_scale"]))[data.used_TK]

    def law(fields: dict[str, Any]) -> Law:
        scaled = shape | fields | {"route_scale": 1.0}
        scaled["route_scale"] = float(np.exp(-np.median(off(scaled))))
        found, residual = _rounded(scaled, lambda each: _worst(off(each)), data.fits)
        own = {name: value for name, value in found.items() if DEFAULTS.get(name) != value}
        return Law(fields=own, residual=residual, worst=float(np.abs(off(found)).max(initial=0)))

    yield law({})
    if shape.get("score_over") == "selected":
        return
    for with_shared in (False, True) if shared_TS.size else (False,):
        normed = {"route_norm": True, "norm_with_shared": with_shared}
        fitted = [
            law(normed | {"norm_p": p, **eps})
            for p in NORMS
            for eps in _eps(data, raw_TK, log_TK, shared_TS, normed | {"norm_p": p})
        ]
        best = min(each.residual for each in fitted)
        if best > data.fits and data.ids_TK.shape[1] > 1:
            fitted += list(_any_order(off, normed, law))
            best = min(each.residual for each in fitted)
        yield from (each for each in fitted if each.residual <= max(data.fits / 2, 1.2 * best))


def _any_order(off, normed: dict[str, Any], law) -> Iterator[Law]:
    """A norm of any order, without an eps."""

    def made(x: np.ndarray) -> dict[str, Any]:
        norm_p, scale = np.exp(np.clip(x, -3, 3)).tolist()
        return normed | {"norm_p": norm_p, "norm_eps": 0.0, "route_scale": scale}

    x = _gauss_newton(lambda x: off(made(x)), np.array([0.4, 0.0]))
    yield law({name: value for name, value in made(x).items() if name != "route_scale"})


DEFAULTS: dict[str, Any] = {
    "score_over": "all", "logit_scale": 1.0, "logit_softcap": None, "norm_form": "add_eps", "norm_eps": 0.0,
    "norm_p": 1.0, "norm_with_shared": False, "route_scale": 1.0,
}  # fmt: skip


def _divisor(raw_TK: np.ndarray, shared_TS: np.ndarray, fields: dict[str, Any]) -> np.ndarray:
    """(T,) what a token's weights are divided by."""
    if not fields.get("route_norm"):
        return np.ones(len(raw_TK))
    in_norm = np.concatenate([raw_TK, shared_TS], axis=-1) if fields.get("norm_with_shared") else raw_TK
    p, eps = fields.get("norm_p", 1.0), fields.get("norm_eps", 0.0)
    largest_T1 = np.maximum(in_norm.max(axis=-1, keepdims=True, initial=0), 1e-300)
    norm_T = largest_T1[:, 0] * ((in_norm / largest_T1) ** p).sum(axis=-1) ** (1 / p)
    divisor_T = np.maximum(norm_T, eps) if fields.get("norm_form") == "clamp" else norm_T + eps
    return np.maximum(divisor_T, SMALLEST)  # of a token without experts it is 0


def _eps(data: Data, raw_TK, log_TK, shared_TS, fields: dict[str, Any]) -> list[dict[str, Any]]:
    """No eps, and the best one of each form where it explains more."""
    used_T = data.used_TK.any(axis=-1)
    log_g_T = np.nanmean(np.where(data.used_TK, log_TK, np.nan)[used_T], axis=-1)
    norm_T = _divisor(raw_TK, shared_TS, fields)[used_T]

    def off(form: str, eps: float) -> np.ndarray:
        log_T = np.log(np.maximum(norm_T, eps) if form == "clamp" else norm_T + eps) - log_g_T
        return log_T - np.median(log_T)

    found: list[dict[str, Any]] = [{"norm_eps": 0.0}]
    none = np.square(off("add_eps", 0.0)).sum()
    for form in ("add_eps", "clamp"):
        # A clamp above, or below, every norm that was seen is none.
        grid = [eps for eps in EPS_GRID if form == "add_eps" or norm_T.min() < eps < norm_T.max() / 1.05]
        errors = [np.square(off(form, eps)).sum() for eps in grid]
        if errors and min(errors) < 0.5 * none:
            around = grid[int(np.argmin(errors))] * 10.0 ** np.linspace(-0.3, 0.3, 241)
            if form == "clamp":
                around = around[around < norm_T.max() / 1.05]
            nearest = min(around, key=lambda eps: np.square(off(form, eps)).sum())
            found.append({"norm_form": form, "norm_eps": float(nearest)})
    return found
