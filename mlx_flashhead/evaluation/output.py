"""The output of ``evaluate``: tables of 80 columns, and a picture."""

from typing import TYPE_CHECKING

from ..common.pictures import pyplot
from ..common.quantities import percent
from ..common.tables import new_table, show
from .answers import AnswerEvaluation
from .masks import MaskEvaluation
from .precision import PrecisionEvaluation
from .structured import StructuredEvaluation
from .text import FLASH_HEAD, Evaluation

if TYPE_CHECKING:  # lm-eval is an extra
    from .tasks import TaskMeasure

LEGEND = """\
agreement   same best token as the dense head
coverage    the true next token is scored
mass        the dense head's probability of all scored tokens
KL          from the dense head's distribution, in nats
perplexity  relative to dense, with the tail's estimates
drawn       relative to dense, probes drawn by probability as in the paper
bytes       read per token, relative to the dense head
unit means  the paper's routing on these clusters; it was made for
            clusters by direction: see convert --calibration none"""
PRECISION_LEGEND = """\
agreement   same best token as the reference: the first line
KL          from the reference's distribution, in nats
perplexity  relative to the reference, with the tail's estimates
MB          read per token
bytes       read per token, relative to a dense head of 16 bits
Only the head's rows differ: 8 and 4 bits are MLX's affine form of the
16-bit rows. Everything else is the checkpoint's own."""

ANSWER_LEGEND = """\
identical   greedy answers that are the dense model's to the end
parting     tokens that the others share with it, the median
nats        how much less likely the dense model finds a token of these
            answers than of its own
p           misses along the dense answers, by the dense head's confidence
            in its token, of {positions} positions"""
MASK_LEGEND = """\
Positions in which the best token is the dense head's:
estimates  tokens that the head has not scored are estimated
exact      after the second look of generate and server
random     this number of allowed tokens, drawn for each position
near       0.5 nats more or less than a token needs"""
TASK_LEGEND = """\
dense       log-likelihoods and perplexities under the dense head
FlashHead   generated text; perplexities with its estimates for tokens
            that were not scored, an approximation of the dense ones
±           standard error, where lm-eval has one"""


def print_table(evaluation: Evaluation) -> None:
    """Prints the evaluation as one table, which fits 80 columns."""
    figures = ("probes", "agreement", "coverage", "mass", "KL", "perplexity", "drawn", "bytes")
    table = new_table(
        f"{evaluation.positions} positions, {evaluation.n_clusters} clusters, "
        f"dense perplexity {evaluation.dense_perplexity:.2f}",
        ("routing", *figures),
        LEGEND,
        padding=(0, 0, 0, 0),
    )
    previous = None
    for measured in evaluation.measures:
        if previous not in (None, measured.routing):
            table.add_section()
        own = measured.routing == FLASH_HEAD and measured.n_probes == evaluation.n_probes
        table.add_row(
            "" if measured.routing == previous else measured.routing,
            f"{measured.n_probes}",
            percent(measured.agreement),
            percent(measured.coverage),
            percent(measured.covered_mass),
            _or_dash(measured.kl, "{:.3f}"),
            _or_dash(measured.perplexity / evaluation.dense_perplexity, "{:.3f}"),
            _or_dash(measured.drawn_perplexity / evaluation.dense_perplexity, "{:.2f}"),
            percent(evaluation.bytes_share[measured.n_probes], 1),
            style="bold" if own else None,
        )
        previous = measured.routing
    show(table)


def print_precisions(evaluation: PrecisionEvaluation) -> None:
    """Prints the forms of the head as one table, which fits 80 columns."""
    reference = evaluation.reference
    table = new_table(
        f"{evaluation.positions} positions, {evaluation.n_clusters} clusters, perplexity of "
        f"the {reference.bits}-bit dense head {reference.perplexity:.2f}",
        ("head", "bits", "probes", "agreement", "KL", "perplexity", "MB", "bytes"),
        PRECISION_LEGEND,
    )
    previous = (reference.head, reference.n_probes)
    for measured in evaluation.measures:
        kind = (measured.head, measured.n_probes)
        if kind != previous:
            table.add_section()
        table.add_row(
            measured.head,
            f"{measured.bits}",
            "–" if measured.n_probes is None else f"{measured.n_probes}",
            percent(measured.agreement),
            f"{measured.kl:.5f}",
            f"{measured.perplexity / reference.perplexity:.4f}",
            f"{measured.bytes_read / 1e6:.2f}",
            percent(measured.bytes_share, 1),
        )
        previous = kind
    show(table)


def print_structured(evaluation: StructuredEvaluation) -> None:
    """Prints the answers within schemas as one table, which fits 80 columns."""
    uncut = evaluation.answers - evaluation.cut
    masks = evaluation.mask_us
    table = new_table(
        f"{evaluation.schemas} JSON schemas, {evaluation.n_probes} probes of "
        f"{evaluation.n_clusters} clusters",
        ("answers", "", "share"),
        f"A token's mask takes {masks['median']:.0f} µs (quartiles {masks['lower']:.0f} to "
        f"{masks['upper']:.0f}, {masks['runs']:,} masks).",
    )
    for name, count, of in (
        ("valid, of those not cut", evaluation.valid, uncut),
        ("cut at the limit of tokens", evaluation.cut, evaluation.answers),
        ("greedy ones that are the dense model's", evaluation.same_as_dense, evaluation.schemas),
    ):
        table.add_row(name, f"{count} of {of}", percent(count / max(1, of), 1))
    show(table)


def print_masks(evaluation: MaskEvaluation) -> None:
    """Prints the choices as one table, which fits 80 columns."""
    table = new_table(
        f"{evaluation.positions} positions, {evaluation.n_probes} probes of "
        f"{evaluation.n_clusters} clusters",
        ("change of the logits", "estimates", "exact", "differing"),
        MASK_LEGEND,
    )
    for choice in evaluation.choices:
        table.add_row(
            choice.change, percent(choice.estimates), percent(choice.exact), f"{choice.differing}"
        )
    show(table)


def print_tasks(measures: "list[TaskMeasure]") -> None:
    """Prints the tasks' metrics as one table."""
    table = new_table(
        None, ("task", "head", "metric", "shots", "samples", "value", "±"), TASK_LEGEND, left=3
    )
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"  # some names are long
    previous = None
    for measured in sorted(measures, key=lambda m: (m.task, m.metric, m.filter)):
        if previous not in (None, measured.task):
            table.add_section()
        named = measured.filter != "none"
        table.add_row(
            "" if measured.task == previous else measured.task,
            measured.head,
            f"{measured.metric} ({measured.filter})" if named else measured.metric,
            _or_dash(measured.n_shots, "{:d}"),
            _or_dash(measured.samples, "{:d}"),
            f"{measured.value:.4f}",
            _or_dash(measured.stderr, "{:.4f}"),
        )
        previous = measured.task
    show(table)


def print_answers(evaluation: AnswerEvaluation) -> None:
    """Prints the answers as one table, which fits 80 columns."""
    way = "through the chat template" if evaluation.chat_template else "without a chat template"
    table = new_table(
        f"{evaluation.requests} requests {way}, at most {evaluation.tokens} tokens, "
        f"{evaluation.n_clusters} clusters",
        ("probes", "bytes", "identical", "parting", "nats", "p<0.5", "0.5-0.8", "p≥0.8"),
        ANSWER_LEGEND.format(positions=", ".join(f"{n:,}" for n in evaluation.positions)),
    )
    for measured in evaluation.measures:
        table.add_row(
            f"{measured.n_probes}",
            percent(measured.bytes_share, 1),
            percent(measured.identical, 1),
            _or_dash(measured.median_parting, "{:.0f}"),
            f"{measured.nats_per_token:+.4f}",
            *(f"{n}" for n in measured.misses),
            style="bold" if measured.n_probes == evaluation.n_probes else None,
        )
    show(table)


def draw(evaluation: Evaluation, path: str) -> None:
    """Draws agreement and coverage over the number of probes into a picture."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, (field, title) in zip(
        axes,
        (("agreement", "Agreement with the dense head"), ("coverage", "True next token scored")),
        strict=True,
    ):
        for routing in dict.fromkeys(m.routing for m in evaluation.measures):
            chosen = [m for m in evaluation.measures if m.routing == routing]
            values = [100 * getattr(m, field) for m in chosen]
            axis.plot([m.n_probes for m in chosen], values, marker="o", label=routing)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set(title=title, xlabel=f"clusters scored of {evaluation.n_clusters}", ylabel="%")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None or value != value else form.format(value)
