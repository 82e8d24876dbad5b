"""conformance, pictures: how even the load of experts is, without bias updates and with them.

    moe-conformance load deepseek_v3 --rate 0.001

Some experts get larger logits than others, in every batch alike. The reference routes fresh tokens in every batch,
twice: with biases that stay 0, and with biases that `moe_ref.bias_update` changes after each batch. Nothing is trained:
the logits do not change, so the load is evened by the bias alone.

Legend: E experts, T tokens of a batch, B batches: the first is before any update, the last after all of them.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conformance.core.chosen import router_of
from conformance.core.usage import UsageError
from conformance.pictures.figure import figure_class, save
from moe_ref.balance import bias_update, load_statistics, tokens_per_expert
from moe_ref.loads import logits_of_load
from moe_ref.routing import route
from moe_ref.specs.balance import BiasUpdateSpec
from moe_ref.specs.checks import integer, number, require
from moe_ref.specs.router import RouterSpec

BLUE, ORANGE = "#0072B2", "#E69F00"
"""Told apart by colour-blind eyes (Okabe and Ito), and in grey."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The loads of every batch of one run."""

    name: str
    colour: str
    counts_BE: np.ndarray

    @property
    def ratios_B(self) -> np.ndarray:
        """The busiest expert's load in units of the mean."""
        return np.array([load_statistics(counts_E).max_over_mean for counts_E in self.counts_BE])

    @property
    def ranked_E(self) -> np.ndarray:
        """The last load of every expert in units of the mean, largest first."""
        counts_E = self.counts_BE[-1]
        return np.sort(counts_E)[::-1] * len(counts_E) / max(counts_E.sum(), 1)

    def num_idle(self, updates: int) -> int:
        """Experts without a token in the batch after so many updates."""
        return load_statistics(self.counts_BE[updates]).num_empty


def load(options: Namespace) -> int:
    """The command: prints the table, and draws it where a file is named."""
    try:
        router = router_of(options.family)
        require(
            router.selector == "top_k",
            f"selector is {router.selector!r}, which takes no bias; a load is evened where the selector is 'top_k'",
        )
        update = BiasUpdateSpec(rate=options.rate)
        number("skew", options.skew, low=0.0)
        if options.distribution is not None:
            logits_of_load(options.distribution, 0, router, np.random.default_rng(0))
        integer("seed", options.seed, 0)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.plot is not None:
        figure_class()
    runs = (
        simulate("without updates", ORANGE, router, update.replace(rate=0.0), options),
        simulate("with updates", BLUE, router, update, options),
    )
    print("\n".join([heading(router, options), "", *table(runs)]))
    if options.plot is not None:
        draw(runs, router, options)
    return 0


def simulate(name: str, colour: str, router: RouterSpec, update: BiasUpdateSpec, options: Namespace) -> Run:
    """The loads of steps + 1 batches, with an update between each two; the logits are the same for every rule."""
    E, learned_scale = router.num_experts, neutral_scale(router)
    popularity_E = options.skew * np.random.default_rng(options.seed).standard_normal(router.num_logits)
    bias_E = np.zeros(router.num_choices)
    counts_BE = []
    for batch in range(options.steps + 1):
        rng = np.random.default_rng((options.seed, batch))
        if options.distribution is None:
            logits_TE = rng.standard_normal((options.tokens, router.num_logits)) + popularity_E
        else:
            logits_TE = logits_of_load(options.distribution, options.tokens, router, rng)
        routing = route(logits_TE, router, expert_bias_E=bias_E, learned_scale=learned_scale)
        counts_BE.append(tokens_per_expert(routing.expert_ids_TK, E))
        # The biases of null experts stay 0: the update evens the load of experts.
        bias_E = np.concatenate([bias_update(counts_BE[-1], update, bias_E[:E]), bias_E[E:]])
    return Run(name=name, colour=colour, counts_BE=np.array(counts_BE))


def neutral_scale(router: RouterSpec) -> np.ndarray | None:
    """Learned scales of 1, where a router has them; they change weights, not choices."""
    shapes = {"none": None, "global": (), "per_expert": (router.num_choices,)}
    shape = shapes[router.learned_scale]
    return None if shape is None else np.ones(shape)


def heading(router: RouterSpec, options: Namespace) -> str:
    """What was simulated."""
    drawn = f"skew {options.skew:g}" if options.distribution is None else f"distribution {options.distribution}"
    return (
        f"{' '.join(options.family)}: {router.num_experts} experts, {router.top_k} of them for each token; "
        f"bias updates: {options.steps}, of rate {options.rate:g}; {options.tokens} tokens before each; {drawn}"
    )


def table(runs: tuple[Run, ...]) -> list[str]:
    """The first batch, those after a quarter and a half of the updates, and the last, as a Markdown table."""
    names = [f"{what}, {run.name}" for what in ("busiest expert, in means", "experts without tokens") for run in runs]
    last = len(runs[0].counts_BE) - 1
    lines = [f"| updates | {' | '.join(names)} |", "|---:" * (1 + len(names)) + "|"]
    for updates in sorted({0, last // 4, last // 2, last}):
        ratios, idle = [f"{run.ratios_B[updates]:.2f}" for run in runs], [str(run.num_idle(updates)) for run in runs]
        lines.append(f"| {updates} | {' | '.join([*ratios, *idle])} |")
    return lines


def draw(runs: tuple[Run, ...], router: RouterSpec, options: Namespace) -> None:
    """Two panels: the busiest expert over the updates, and the load of every expert after the last, in order."""
    figure = figure_class()(figsize=(10, 4.4), layout="constrained")
    over_updates, at_end = figure.subplots(1, 2)
    for run in runs:
        over_updates.plot(run.ratios_B, color=run.colour, label=run.name)
        at_end.plot(np.arange(1, router.num_experts + 1), run.ranked_E, color=run.colour, label=run.name)
    for axes in (over_updates, at_end):
        axes.axhline(1, color="0.3", linewidth=1, linestyle="--", label="mean of all experts")
        axes.set_ylabel("load / mean load")
        axes.margins(x=0.01)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    # Equal distances are equal factors, so that the small differences after the fall can be read.
    over_updates.set_yscale("log", base=2)
    over_updates.yaxis.set_major_formatter("{x:g}")
    over_updates.set_ylim(0.9, 1.2 * max(2, *(run.ratios_B.max() for run in runs)))
    over_updates.set(title="Busiest expert (logarithmic)", xlabel="bias updates")
    at_end.yaxis.set_major_formatter("{x:g}")
    at_end.set_ylim(bottom=0)
    at_end.set(title=f"Every expert after update {options.steps}", xlabel="experts, busiest first")
    figure.legend(*at_end.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{' '.join(options.family)}: E = {router.num_experts}, K = {router.top_k}, rate {options.rate:g}")
    save(figure, options.plot, dpi=150)


def add_options(command: ArgumentParser, positive: Callable[[str], int]) -> None:
    """The options of the command; `positive` reads an integer of at least 1."""
    command.add_argument(
        "family", nargs="+", metavar="FAMILY", help="whose router, such as deepseek_v3, or deepseek_v3 num_experts=384"
    )
    for name, default, meaning in (
        ("--steps", 200, "updates of the bias"),
        ("--tokens", 1024, "tokens of each batch"),
    ):
        command.add_argument(name, type=positive, default=default, metavar="N", help=f"{meaning} (default {default})")
    command.add_argument("--rate", type=float, default=0.001, metavar="R", help="of the update (default 0.001)")
    command.add_argument(
        "--skew", type=float, default=1.0, metavar="S", help="spread of the experts' mean logits (default 1)"
    )
    command.add_argument(
        "--distribution",
        metavar="D",
        help="the shares of experts, in place of --skew: uniform, zipf:S, hot:P, or a number for each with commas",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the logits (default 0)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="draw the loads, with matplotlib")
