"""tests of the judge: a small router of our own, right and wrong, as a third party would hand it in."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from conformance import Routing, Subject


class Sigmoid(Subject):
    """Sigmoid, groups, norm and scale, in plain NumPy; right."""

    name, version = "right", "1"

    def supports(self, spec, layout=None):
        if spec.num_expert_groups == spec.num_experts or spec.num_null_experts:
            return "top-2 group scores, no groups of one, no null experts"
        plain = type(spec)(
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            score_func="sigmoid",
            num_expert_groups=spec.num_expert_groups,
            num_limited_groups=spec.num_limited_groups,
            group_score_k=min(2, spec.experts_per_group),
            route_norm=spec.route_norm,
            norm_eps=spec.norm_eps,
            route_scale=spec.route_scale,
        )
        return None if spec == plain else "sigmoid, top-2 groups, sum norm and scale alone"

    def mask(self, choice_TE, kept_TE):
        return np.where(kept_TE, choice_TE, -np.inf)

    def route(self, logits_TE, spec, expert_bias_E):
        scores_TE = np.exp(-np.logaddexp(0, -logits_TE.astype(np.float64)))
        choice_TE = scores_TE if expert_bias_E is None else scores_TE + expert_bias_E
        if spec.num_expert_groups is not None:
            T, G = len(choice_TE), spec.num_expert_groups
            groups_TG = np.sort(choice_TE.reshape(T, G, spec.experts_per_group))[:, :, -2:].sum(axis=-1)
            kept_TG = np.zeros((T, G), dtype=bool)
            np.put_along_axis(
                kept_TG, np.argsort(-groups_TG, kind="stable")[:, : spec.num_limited_groups], True, axis=1
            )
            choice_TE = self.mask(choice_TE, np.repeat(kept_TG, spec.experts_per_group, axis=1))
        ids_TK = np.argsort(-choice_TE, axis=-1, kind="stable")[:, : spec.top_k]
        weights_TK = np.take_along_axis(scores_TE, ids_TK, axis=-1)
        if spec.route_norm:
            weights_TK = weights_TK / (weights_TK.sum(axis=-1, keepdims=True) + spec.norm_eps)
        return Routing(expert_ids_TK=ids_TK, weights_TK=weights_TK * spec.route_scale)


class MaskedZero(Sigmoid):
    """Fills dropped groups with 0 (huggingface/transformers#45440)."""

    name = "masked-zero"

    def mask(self, choice_TE, kept_TE):
        return np.where(kept_TE, choice_TE, 0.0)


class Crashing(Sigmoid):
    name = "crashing"

    def route(self, logits_TE, spec, expert_bias_E):
        raise RuntimeError("kernel launch failed")


class Ascending(Sigmoid):
    """Right, but its slots stand from the worst to the best."""

    name = "ascending"

    def route(self, logits_TE, spec, expert_bias_E):
        found = super().route(logits_TE, spec, expert_bias_E)
        return Routing(expert_ids_TK=found.expert_ids_TK[:, ::-1], weights_TK=found.weights_TK[:, ::-1])


class Hanging(Sigmoid):
    """Never returns where there is no token, nor does a process that it starts."""

    name = "hanging"

    def route(self, logits_TE, spec, expert_bias_E):
        if len(logits_TE) == 0:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            with Path("pids.txt").open("a") as file:
                print(os.getpid(), child.pid, file=file)
            time.sleep(600)
        return super().route(logits_TE, spec, expert_bias_E)


class Ending(Sigmoid):
    """Ends the process where there is no token."""

    name = "ending"

    def route(self, logits_TE, spec, expert_bias_E):
        if len(logits_TE) == 0:
            os._exit(7)
        return super().route(logits_TE, spec, expert_bias_E)


class Losing(Sigmoid):
    """Breaks the context of its device where there is no token, and every later call in its process fails as well."""

    name, is_lost = "losing", False

    def route(self, logits_TE, spec, expert_bias_E):
        Losing.is_lost |= len(logits_TE) == 0
        if Losing.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().route(logits_TE, spec, expert_bias_E)


class Late(Hanging):
    """Raises an error where there are tokens, and never returns where there are none."""

    name = "late"

    def route(self, logits_TE, spec, expert_bias_E):
        if len(logits_TE):
            raise RuntimeError("kernel launch failed")
        return super().route(logits_TE, spec, expert_bias_E)


class Empty(Subject):
    """Defines nothing."""


class Interrupting(Sigmoid):
    """Its version of a bug in the judge: `supports` itself raises."""

    name = "interrupting"

    def supports(self, spec, layout=None):
        raise TypeError("supports() is broken")


class Once(Sigmoid):
    """Raises an error on the first case with tokens, and never again."""

    name = "once"

    def route(self, logits_TE, spec, expert_bias_E):
        seen = Path("seen.txt")
        if len(logits_TE) and not seen.exists():
            seen.touch()
            raise RuntimeError("kernel launch failed")
        return super().route(logits_TE, spec, expert_bias_E)
