"""FlashHead: an output projection that scores the rows of the likeliest clusters. Arrays only.

Source: arXiv 2603.14591. docs/how-it-works.md has the steps and what differs.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from .adjustment import Adjustment
from .backend import (
    BACKEND_VARIABLE,
    HOW_TO_REPORT,
    METAL,
    PORTABLE,
    check_kernels,
    choose_backend,
    compared_states,
    gpu_is_default,
    log,
    make_steps,
    named_backend,
    scores_agree,
)
from .clustered import Centroids, ClusteredRows, in_token_order
from .dense_kernels import dense_kernel
from .draws.greedy import best_draws
from .draws.rows import Draw, Draws
from .logit_map import IDENTITY, LogitMap, all_values
from .matrix import Matrix
from .metal_steps import MetalSteps
from .proposal import Candidates, Proposal, ProposalRow, Selection
from .rounding import Rounding, Stretch, differs_in_batches, measure_rounding
from .row_products import products_of_each
from .slot_product import SlotProduct, Source
from .steps import NO_DEPTH, PortableSteps, Risk
from .verdict import Verdict

# Score of clusters whose tokens must not be drawn: exp() of it is 0; -inf breaks softcaps and JSON.
NEVER_DRAWN = -1e4

OTHER_SUMS = (
    "This version of MLX multiplies reordered rows in another order of sums: where FlashHead needs "
    "dense logits it puts the rows in order first, which takes longer."
)
MOST_TRACED = 64  # kinds of proposals whose steps are kept

Function = Callable[..., tuple[mx.array, ...]]  # the steps of a proposal
Projection = Callable[[mx.array], mx.array]  # hidden (..., D) → logits (..., V)


class _OfThread(threading.local):
    """What each thread has of its own: who makes the logits of calls, and traced functions.

    MLX keeps the traces of threads apart. Those of a function that several had called would stay
    when it is gone, for the next one in its place.
    """

    def __init__(self) -> None:
        self.project: Projection | None = None  # within a block of `intercepted`
        self.by_kind: dict[Any, Function] = {}  # of proposals
        self.latest: tuple[Any, Function | None] = None, None  # the one used last, and its kind


class FlashHead:
    """An output projection by retrieval. A plain call is the normal (dense) head.

    Loops that verify call :meth:`propose`. The unverified head is :meth:`unverified_logits`, or a
    call within a :meth:`settings` block: only scored tokens have exact logits there, others have
    estimates.

    ``backend_reason`` says why ``backend`` was taken. Shapes: hidden states (..., D); V tokens in C
    clusters of ``cluster_size``, of which p = ``n_probes`` are scored per position.

    Args:
        rows: The dense head's rows in token order. They are reordered; the caller drops its copy.
        token_ids: (C, cluster_size) integers, V in padded slots.
        centroids: Centroids fitted for these clusters.
        n_probes: Clusters scored for a proposal that is verified, 1 … C.
        unverified_probes: Clusters scored without verification; None: ``n_probes``.
        risk: How likely a proposal differs from the dense choice.
        eos_token_ids: Their clusters are always among the probes, so that an answer can end.
        backend: "metal", "mlx" or None: the environment variable MLX_FLASHHEAD_BACKEND, else Metal
            if MLX computes on an Apple GPU. ValueError if it, ``n_probes`` or ``token_ids`` is not
            valid.
    """

    def __init__(
        self,
        rows: Matrix,
        token_ids: np.ndarray,
        centroids: Centroids,
        *,
        n_probes: int,
        unverified_probes: int | None = None,
        risk: Risk | None = None,
        eos_token_ids: tuple[int, ...] = (),
        backend: str | None = None,
    ):
        # as a CPU's BLAS reads rows faster
        by_column = (
            choose_backend(backend) == PORTABLE
            and rows.weight.dtype == mx.float32
            and mx.default_device().type == mx.cpu
        )
        self.clustered = ClusteredRows.build(rows, token_ids, centroids, eos_token_ids, by_column)
        self.vocab_size = rows.n_rows
        self.hidden_size = rows.hidden_size
        self.n_clusters, self.cluster_size = token_ids.shape
        self.steps, self.backend_reason = make_steps(self.clustered, backend)
        # as long as this head lives, pickled or not
        self._requested_backend = PORTABLE if self.backend == PORTABLE else backend
        self.eos_token_ids = tuple(eos_token_ids)
        self.risk = risk or Risk()
        self.n_probes = n_probes
        self.unverified_probes = n_probes if unverified_probes is None else unverified_probes
        self._verified = True  # whether a plain call is the dense head's
        self._draw_temperature: float | None = None
        self._of_thread = _OfThread()
        self.n_traced = 0  # functions made so far, each of which takes MLX a while
        self._roundings: dict[mx.Dtype, dict[int, Rounding]] = {}  # of these steps, measured
        # Whether the dense logits of one state are products with the rows in token order: with
        # those in the order of the clusters an Apple GPU adds in another order.
        self.gathers_rows = mx.metal.is_available() and (
            dense_kernel(rows, rows.n_rows) != dense_kernel(rows, token_ids.size)
        )
        # makes the logits of calls that nobody intercepts, from this head or a copy of it
        self.projection: Callable[[FlashHead, mx.array], mx.array] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: kernels, and who intercepts calls."""
        here = ("steps", "_of_thread", "_roundings")
        return {k: v for k, v in vars(self).items() if k not in here} | {"projection": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._of_thread = _OfThread()
        self._roundings = {}
        self.steps, reason = make_steps(self.clustered, self._requested_backend)
        mx.eval(self.steps.arrays())  # another thread could not
        if self.backend != PORTABLE:  # else the reason may be a kernel that has failed
            self.backend_reason = reason

    def __deepcopy__(self, memo: dict[int, Any]) -> "FlashHead":
        """A head with its own settings that shares the arrays and the steps."""
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        copied._of_thread = _OfThread()
        copied._roundings = dict(self._roundings)
        return copied

    @property
    def backend(self) -> str:
        """The path in use: "metal" or "mlx"."""
        return self.steps.name

    @property
    def n_probes(self) -> int:
        """The number of clusters scored for a proposal, 1 … C.

        Setting it sets ``unverified_probes`` too.

        Raises:
            ValueError: If it is set to anything else.
        """
        return self._n_probes

    @n_probes.setter
    def n_probes(self, value: int) -> None:
        self.unverified_probes = value
        self._n_probes = self._unverified_probes

    @property
    def unverified_probes(self) -> int:
        """The number of clusters scored where nothing verifies the choice, 1 … C.

        Raises:
            ValueError: If it is set to anything else.
        """
        return self._unverified_probes

    @unverified_probes.setter
    def unverified_probes(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"n_probes must be a whole number, not {value!r}.")
        if not 1 <= value <= self.n_clusters:
            raise ValueError(
                f"n_probes is {value}, but this head has {self.n_clusters} clusters: "
                f"choose 1 to {self.n_clusters}."
            )
        self._unverified_probes = int(value)

    def arrays(self) -> list[mx.array]:
        """All arrays of this head, for ``mx.eval`` and for measuring memory."""
        return [*self.clustered.arrays(), *self.steps.arrays()]

    def check_kernels(
        self, dtype: mx.Dtype, rows: Matrix | None = None, logit_map: LogitMap = IDENTITY
    ) -> None:
        """Runs each kernel once, so that all that settings can ask for is compiled.

        If one fails, takes the portable path.

        Args:
            dtype: Of the hidden states.
            rows: The model's own, in token order: on an Apple GPU the dense logits are compared
                with theirs.
            logit_map: What the model does to each of its head's logits. With another one than the
                identity only the kernels that know of it run.

        Raises:
            ValueError: If one fails and the backend "metal" was requested by name.
        """
        self.steps, trouble = check_kernels(self.steps, dtype, self.n_probes, logit_map)
        if trouble is not None:
            self.fall_back(trouble)
        if rows is not None and gpu_is_default():
            self.compare_dense_rows(rows, dtype)

    def fall_back(self, trouble: str) -> None:
        """Takes MLX's operations from now on, because of trouble with the kernels.

        Args:
            trouble: What it is, as a part of a sentence.

        Raises:
            ValueError: If the backend "metal" was requested by name.
        """
        if named_backend(self._requested_backend) == METAL:
            raise ValueError(
                f"FlashHead's Metal kernels cannot be used: {trouble}; use backend='mlx' or "
                f"unset {BACKEND_VARIABLE}, and {HOW_TO_REPORT}."
            )
        self.backend_reason = (
            "FlashHead takes MLX's own operations instead of its Metal kernels, because "
            f"{trouble}; {HOW_TO_REPORT}."
        )
        log.warning(self.backend_reason)
        self.steps = PortableSteps(self.clustered)
        self._roundings = {}
        self._requested_backend = PORTABLE

    def compare_dense_rows(self, rows: Matrix, dtype: mx.Dtype) -> None:
        """Compares the dense logits of single states with those of the model's own rows.

        Where they are not the same numbers, the rows are put in order for them from now on.
        Evaluates.

        Args:
            rows: (V, D), in token order.
            dtype: Of the hidden states.
        """
        for hidden in compared_states(rows, rows.n_rows, dtype):
            if not mx.array_equal(self.dense_logits(hidden), rows.matmul(hidden)).item():
                self.gathers_rows = True
                log.warning(OTHER_SUMS)
                return

    def scored_logits_agree(self, dtype: mx.Dtype) -> float:
        """Returns the share of logits that scoring gives like MLX's product with one state.

        They must agree to the last bit. Evaluates.
        """
        return scores_agree(self.steps, self.dense_logits, dtype)

    def applies(self, logit_map: LogitMap, dtype: mx.Dtype) -> bool:
        """Returns whether the steps map logits of ``dtype`` as MLX's operations do.

        In 16 bits all must agree to the last bit, in float32 within the map's slack. Evaluates.
        """
        if not isinstance(self.steps, MetalSteps):
            return True
        values = all_values(dtype)
        expected = logit_map(values).astype(mx.float32)
        try:
            found = self.steps.mapped(values, logit_map).astype(mx.float32)
            off = mx.abs(found - expected) > logit_map.slack(dtype) / 4 * mx.abs(expected)
            return not off.any().item()
        except RuntimeError:  # the kernel does not run on this device
            return False

    @contextmanager
    def settings(
        self,
        *,
        n_probes: int | None = None,
        dense: bool = False,
        draw_temperature: float | None = None,
    ) -> Iterator["FlashHead"]:
        """A block in which a call is the unverified head's, with these settings.

        Source: Efraimidis and Spirakis 2006 / Gumbel top-k: perturbed scores, then the p largest.

        Args:
            n_probes: Clusters that are scored; by default ``unverified_probes``.
            dense: Whether every token is scored.
            draw_temperature: A temperature above 0 at which the p clusters are drawn without
                replacement from softmax(S / temperature); all tokens but theirs get a logit of
                about -10,000. Sampled at the same temperature, that is the paper's "sampling over
                the full vocabulary".

        Raises:
            ValueError: If a setting is not valid.
        """
        if dense and n_probes is not None:
            raise ValueError("dense scores every token: leave n_probes out.")
        if draw_temperature is not None and not draw_temperature > 0:
            raise ValueError(
                f"The temperature of the draw is {draw_temperature}: it must be above 0."
            )
        names = ("_n_probes", "_unverified_probes", "_verified", "_draw_temperature")
        before = {name: getattr(self, name) for name in names}
        if n_probes is not None:
            self.n_probes = n_probes
        self._verified = dense
        self._draw_temperature = draw_temperature
        try:
            yield self
        finally:
            vars(self).update(before)

    @contextmanager
    def intercepted(self, project: Projection) -> Iterator[None]:
        """A block in which ``project`` makes the logits of each call from its hidden states.

        That holds in this thread: another one may run the model at the same time.
        """
        of_thread = self._of_thread
        before = of_thread.project
        of_thread.project = project
        try:
            yield
        finally:
            of_thread.project = before

    def __call__(self, hidden: mx.array) -> mx.array:
        """Returns full logits: hidden (..., D) → (..., V). Lazy.

        They are :meth:`dense_logits`, within a block of :meth:`settings` :meth:`unverified_logits`.
        """
        project = self._of_thread.project
        if project is not None:
            return project(hidden)
        if self.projection is not None:
            return self.projection(self, hidden)
        return self.dense_logits(hidden) if self._verified else self.unverified_logits(hidden)

    def dense_logits(self, hidden: mx.array) -> mx.array:
        """The dense head's logits: hidden (..., D) → (..., V).

        For one state they are those of the model's own rows on an Apple GPU, to the last bit.
        """
        states = hidden.reshape(-1, hidden.shape[-1])
        if len(states) == 1 and self.gathers_rows:
            logits = self.clustered.token_rows().matmul(states)
        else:
            logits = self.steps.dense(states)
        return logits.reshape(*hidden.shape[:-1], self.vocab_size)

    def dense_logits_of_each(self, hidden: mx.array) -> mx.array:
        """The dense logits of T states as each one alone has them: hidden (..., D) → (..., V).

        Quantized rows are read once for all of them where there is a way.
        """
        states = hidden.reshape(-1, hidden.shape[-1])
        products = None
        if self.clustered.rows.quantized and not self.gathers_rows:
            products = products_of_each(states, self.clustered.flat_rows())
        if products is None:
            logits = mx.concatenate([self.dense_logits(state[None]) for state in states])
        else:
            logits = in_token_order(products, self.clustered.slot_of)
        return logits.reshape(*hidden.shape[:-1], self.vocab_size)

    def unverified_logits(
        self,
        hidden: mx.array,
        n_probes: int | None = None,
        draw_temperature: float | None = None,
    ) -> mx.array:
        """Returns logits (..., V) by retrieval: exact if probed, else estimates below the best.

        The arguments are those of :meth:`settings`, which gives their values if they are None.
        """
        n_probes = self.unverified_probes if n_probes is None else n_probes
        temperature = self._draw_temperature if draw_temperature is None else draw_temperature
        if n_probes == self.n_clusters and temperature is None:
            return self.dense_logits(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        scores, selection, candidates = self._retrieve(
            rows, n_probes, words=True, draw_temperature=temperature
        )
        if temperature is not None:
            scores = mx.full(scores.shape, NEVER_DRAWN, dtype=mx.float32)
            # without the estimates, which belong to other scores
            selection = Selection(selection.probes[:, :n_probes])
            candidates = Candidates(candidates.logits[:, :n_probes])
        return self.steps.expand(scores, selection, candidates).reshape(
            *hidden.shape[:-1], self.vocab_size
        )

    def draft_logits(
        self, hidden: mx.array, token_ids: mx.array | None = None, *, n_probes: int | None = None
    ) -> mx.array:
        """Returns full logits by few clusters, for tokens that a target verifies.

        Args:
            hidden: (..., D).
            token_ids: Tokens (K,) that are scored beside the clusters.
            n_probes: The number of clusters.

        Returns:
            (..., V).
        """
        logits = self.unverified_logits(hidden, n_probes)
        if token_ids is None:
            return logits
        scored = self.clustered.token_rows(token_ids).matmul(hidden).astype(logits.dtype)
        return mx.put_along_axis(logits, mx.broadcast_to(token_ids, scored.shape), scored, axis=-1)

    def propose(
        self,
        hidden: mx.array,
        draws: Draws | None = None,
        *,
        n_probes: int | None = None,
        depth: float = NO_DEPTH,
        logit_map: LogitMap = IDENTITY,
        adjustment: Adjustment | None = None,
        allowed: mx.array | None = None,
    ) -> Proposal:
        """Tokens chosen from a few clusters, for the dense rows to verify.

        Args:
            hidden: (R, D), the states.
            draws: Of R rows. Without them the best logits win.
            n_probes: Clusters that are scored; None: the head's number.
            depth: Nats of the model's logits below the mass of all, from which kernels leave
                clusters out.
            logit_map: What the model does to each of its head's logits.
            adjustment: What biases and penalties change. The clusters of these tokens are scored,
                too.
            allowed: (R, ⌈V/32⌉) uint32, a bit a token, the lowest first, whether it may be chosen;
                None where all may. If no scored token may be, the row's risk is NOTHING_ALLOWED
                and its token is no choice: the dense row has to choose at once.

        Returns:
            The tokens, with the scored tokens' logits by which they were chosen: as the model gives
            them, adjusted, and the lowest finite value of those that are not allowed.
        """
        draws = best_draws(len(hidden)) if draws is None else draws
        n_probes = self.n_probes if n_probes is None else n_probes
        if adjustment is not None:
            n_probes = min(n_probes + adjustment.n_tokens, self.n_clusters)
        rows, most_occurrences = self.steps.structure_of(draws, adjustment)
        kind = _Kind(
            steps=self.steps,
            risk=self.risk,
            n_probes=n_probes,
            depth=depth,
            rows=rows,
            logit_map=logit_map,
            most_occurrences=most_occurrences,
        )
        arrays = (
            hidden,
            draws.inputs,
            [] if adjustment is None else [adjustment.words, adjustment.latest],
            [] if allowed is None else [allowed],
        )
        # MLX compiles the operations that it joins in a trace, about a second each on a CPU. Beside
        # a mask, which the host makes for each token, that does not pay.
        if allowed is None or isinstance(self.steps, MetalSteps):
            return Proposal(hidden, *self._traced(kind)(*arrays))
        return Proposal(hidden, *kind.propose(*arrays))

    def _traced(self, kind: "_Kind") -> Function:
        """The steps of proposals of one kind, as a function that MLX traces once."""
        latest, function = self._of_thread.latest
        if kind == latest:  # which takes a fraction of the time that its hash takes
            return cast(Function, function)
        functions = self._of_thread.by_kind
        if kind not in functions:
            while len(functions) >= MOST_TRACED:
                del functions[next(iter(functions))]
            self.n_traced += 1
            functions[kind] = cast(Function, mx.compile(kind.propose))
        self._of_thread.latest = kind, functions[kind]
        return functions[kind]

    def joined(
        self, proposals: Sequence[Proposal], rows: Sequence[ProposalRow], tokens: Sequence[int]
    ) -> Proposal:
        """Rows of several proposals, with their ``tokens``, as one without risk."""
        most = max(proposal.probes.shape[1] for proposal in proposals)
        filled = [proposal.filled(most) for proposal in proposals]
        hidden, probes, logits = self.steps.join(filled, rows)
        return Proposal(
            hidden, mx.array(list(tokens), mx.uint32), probes, logits, mx.zeros(len(rows))
        )

    @property
    def joined_early(self) -> int:
        """Pending rows that are joined before the launch of their verification; 0: all at once."""
        return self.steps.joined_early

    def verify(
        self,
        proposal: Proposal,
        draws: Draws,
        *,
        logit_map: LogitMap = IDENTITY,
        allowed: mx.array | None = None,
        stretches: Sequence[Stretch] = (),
        sources: Sequence[Source] | None = None,
    ) -> Verdict:
        """Launches the verification of proposed tokens by the dense rows.

        Args:
            proposal: Of k rows.
            draws: The draws of :meth:`propose`, of k rows.
            logit_map: As of :meth:`propose`.
            allowed: As of :meth:`propose`, of k rows.
            stretches: What biases and penalties make of the distances of each row's logits; by
                default nothing.
            sources: Where the k states are that have been computed already; None: in the proposal.

        Returns:
            Says which tokens are accepted, and which are in doubt.
        """
        k = len(proposal.hidden)
        return Verdict(
            steps=self.steps,
            proposal=proposal,
            draws=draws,
            product=SlotProduct(self.steps, proposal.hidden, sources),
            rounding=self.rounding(proposal.hidden.dtype, k),
            stretches=stretches,
            logit_map=logit_map,
            allowed=allowed,
        )

    def rounding(self, dtype: mx.Dtype, k: int) -> Rounding:
        """The bounds for products of ``k`` states of ``dtype``, measured by now or else at once."""
        by_size = self.measure_rounding(dtype)
        return next((by_size[size] for size in by_size if size >= k), by_size[max(by_size)])

    def measure_rounding(self, dtype: mx.Dtype) -> dict[int, Rounding]:
        """The bounds for products of states, by class of their number. Evaluates once."""
        if dtype not in self._roundings:
            self._roundings[dtype] = measure_rounding(self.steps, self.dense_logits, dtype)
        return self._roundings[dtype]

    def differs_in_batches(self, dtype: mx.Dtype) -> bool:
        """Whether a state's dense logits may be others in a product of several states.

        By more than float32's own rounding. ``dtype`` is that of the states.
        """
        return differs_in_batches(self.clustered.rows, dtype)

    def _retrieve(
        self,
        rows: mx.array,
        n_probes: int,
        words: bool,
        draw_temperature: float | None = None,
    ) -> tuple[mx.array, Selection, Candidates]:
        """Retrieves for (R, D): scores (R, C), the probed clusters, and their logits.

        ``words`` are for `expand`.
        """
        scores = ordering = self.steps.route(rows)
        if draw_temperature is not None:
            # always probed clusters keep their 1e30 and stay on top
            ordering = scores / draw_temperature + mx.random.gumbel(scores.shape)
        selection = self.steps.select(ordering, n_probes, words)
        return scores, selection, self.steps.score(rows, selection)


class _Kind(NamedTuple):
    """What proposals have in common whose steps are the same, on other arrays."""

    steps: PortableSteps
    risk: Risk
    n_probes: int
    depth: float
    rows: tuple[Draw, ...]  # as of `Draws.structure`
    logit_map: LogitMap
    most_occurrences: int | None  # of the adjustment; None without one

    def propose(
        self,
        hidden: mx.array,
        draw_inputs: tuple[mx.array, mx.array, mx.array],
        adjusted: list[mx.array],
        allowed: list[mx.array],
    ) -> tuple[mx.array, ...]:
        """The steps: tokens, probes, logits and risks of the states (R, D)."""
        steps = self.steps
        draws = Draws(self.rows, draw_inputs)
        adjustment = None
        if self.most_occurrences is not None:
            adjustment = Adjustment(adjusted[0], adjusted[1], self.most_occurrences)
        selection = steps.select(
            steps.route(hidden),
            self.n_probes,
            words=False,
            depth=self.depth / self.logit_map.slope,
            logit_map=self.logit_map,
            adjustment=adjustment,
            mass=not draws.all_greedy,
        )
        candidates = steps.score(hidden, selection, self.logit_map)
        if adjustment is not None or allowed:
            mask = allowed[0] if allowed else None
            candidates = steps.adjust(selection, candidates, adjustment, mask)
        tokens, risk = steps.choose(
            selection, candidates, draws, self.risk, self.logit_map, masked=bool(allowed)
        )
        # without the probes that a kernel repeats
        probes = selection.probes[:, : self.n_probes]
        return tokens, probes, candidates.logits[:, : self.n_probes], risk
