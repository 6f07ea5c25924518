"""FlashHead: an output projection that scores the rows of the likeliest clusters. Arrays only.

Source: arXiv 2603.14591. docs/how-it-works.md explains it, and what differs.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from .adjustment import Adjustment
from .backend import METAL, PORTABLE, choose_backend, gpu_is_default, log
from .chosen_operations import ChosenOperations
from .clustered import Centroids, ClusteredRows, in_token_order
from .dense_kernels import dense_kernel
from .draws.draw import Draws
from .draws.greedy import best_draws
from .head_settings import HeadSettings
from .logit_map import IDENTITY, LogitMap
from .matrix import Matrix
from .operations import NO_DEPTH, PortableOperations, Risk
from .proposal import Proposal, ProposalPosition
from .proposal_function import ProposalFunction, TracedFunctions
from .rounded_product import (
    Rounding,
    SlotProduct,
    Source,
    Stretch,
    differs_in_batches,
    measure_rounding,
)
from .row_products import products_of_each
from .same_sums import compared_states, scores_agree
from .unverified import unverified_logits
from .verdict import Verdict

OTHER_SUMS = (
    "This version of MLX multiplies reordered rows in another order of sums: where FlashHead needs "
    "dense logits it puts the rows in order first, which takes longer."
)
# Hidden states (..., D) → logits (..., V).
Projection = Callable[[mx.array], mx.array]


class _Interceptor(threading.local):
    """What each thread has of its own: who makes the logits of calls."""

    def __init__(self) -> None:
        # Who makes them within a block of `intercepted`.
        self.project: Projection | None = None


class FlashHead:
    """An output projection by retrieval. A plain call is the normal (dense) head.

    Loops that verify call :meth:`propose`. The unverified head is :meth:`unverified_logits`, or a
    call within a :meth:`settings` block: only scored tokens have exact logits there, others have
    estimates.

    Shapes: hidden states (..., D); V tokens in C
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
        # A CPU's BLAS reads such rows faster.
        by_column = (
            choose_backend(backend) == PORTABLE
            and rows.weight.dtype == mx.float32
            and mx.default_device().type == mx.cpu
        )
        self.clustered = ClusteredRows.build(rows, token_ids, centroids, eos_token_ids, by_column)
        self.vocab_size = rows.n_rows
        self.hidden_size = rows.hidden_size
        self.n_clusters, self.cluster_size = token_ids.shape
        self._chosen = ChosenOperations(self.clustered, backend)
        self.eos_token_ids = tuple(eos_token_ids)
        self.risk = risk or Risk()
        self._settings = HeadSettings.of(self.n_clusters, n_probes, unverified_probes)
        self._of_thread = _Interceptor()
        self._traced = TracedFunctions()
        # The bounds that were measured of its operations, by dtype and by number of states.
        self._roundings: dict[mx.Dtype, dict[int, Rounding]] = {}
        # Whether the dense logits of one state are products with the rows in token order: with
        # those in the order of the clusters an Apple GPU adds in another order.
        self.gathers_rows = mx.metal.is_available() and (
            dense_kernel(rows, rows.n_rows) != dense_kernel(rows, token_ids.size)
        )
        # Makes the logits of calls that nobody intercepts, from this head or a copy of it.
        self.projection: Callable[[FlashHead, mx.array], mx.array] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: traces, measures, and who intercepts calls."""
        state = {**vars(self), "projection": None}
        for name in ("_of_thread", "_traced", "_roundings"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._of_thread = _Interceptor()
        self._traced = TracedFunctions()
        self._roundings = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "FlashHead":
        """A head with its own settings that shares the arrays and the operations."""
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        copied._chosen = self._chosen.copy()
        copied._of_thread = _Interceptor()
        copied._traced = TracedFunctions()
        copied._roundings = dict(self._roundings)
        return copied

    @property
    def operations(self) -> PortableOperations:
        """The operations in use."""
        return self._chosen.operations

    @property
    def backend(self) -> str:
        """The path in use: "metal" or "mlx"."""
        return self.operations.name

    @property
    def backend_reason(self) -> str:
        """A sentence: why this path is in use, or what is slower on it."""
        return self._chosen.reason

    @property
    def n_traced(self) -> int:
        """Functions of proposals that MLX has traced so far, each of which takes it a while."""
        return self._traced.n_traced

    @property
    def n_probes(self) -> int:
        """The number of clusters scored for a proposal, 1 … C.

        Setting it sets ``unverified_probes`` too.

        Raises:
            ValueError: If it is set to anything else.
        """
        return self._settings.n_probes

    @n_probes.setter
    def n_probes(self, value: int) -> None:
        self._settings = self._settings.with_n_probes(value)

    @property
    def unverified_probes(self) -> int:
        """The number of clusters scored where nothing verifies the choice, 1 … C.

        Raises:
            ValueError: If it is set to anything else.
        """
        return self._settings.unverified_probes

    @unverified_probes.setter
    def unverified_probes(self, value: int) -> None:
        self._settings = self._settings.with_unverified_probes(value)

    def arrays(self) -> list[mx.array]:
        """All arrays of this head, for ``mx.eval`` and for measuring memory."""
        return [*self.clustered.arrays(), *self.operations.arrays()]

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
        before = self.operations
        self._chosen.try_kernels(dtype, self.n_probes, logit_map)
        if self.operations is not before:
            self._roundings = {}
        if rows is not None and gpu_is_default():
            self.compare_dense_rows(rows, dtype)

    def fall_back(self, trouble: str) -> None:
        """Takes the portable operations from now on: as `ChosenOperations.fall_back`."""
        self._chosen.fall_back(trouble)
        self._roundings = {}

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
        return scores_agree(self.operations, self.dense_logits, dtype)

    def applies(self, logit_map: LogitMap, dtype: mx.Dtype) -> bool:
        """Whether the head maps logits of ``dtype`` as MLX does. Evaluates."""
        return self._chosen.maps_as_mlx(logit_map, dtype)

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
        before = self._settings
        self._settings = before.of_block(n_probes, dense, draw_temperature)
        try:
            yield self
        finally:
            self._settings = before

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
        if self._settings.verified:
            return self.dense_logits(hidden)
        return self.unverified_logits(hidden)

    def dense_logits(self, hidden: mx.array) -> mx.array:
        """The dense head's logits: hidden (..., D) → (..., V).

        For one state they are those of the model's own rows on an Apple GPU, to the last bit.
        """
        states = hidden.reshape(-1, hidden.shape[-1])
        if len(states) == 1 and self.gathers_rows:
            logits = self.clustered.token_rows().matmul(states)
        else:
            logits = self.operations.dense(states)
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
        if n_probes is None:
            n_probes = self._settings.unverified_probes
        if draw_temperature is None:
            draw_temperature = self._settings.draw_temperature
        if n_probes == self.n_clusters and draw_temperature is None:
            return self.dense_logits(hidden)
        states = hidden.reshape(-1, hidden.shape[-1])
        logits = unverified_logits(self.operations, states, n_probes, draw_temperature)
        return logits.reshape(*hidden.shape[:-1], self.vocab_size)

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
        index = mx.broadcast_to(token_ids, scored.shape)
        return mx.put_along_axis(logits, index, scored, axis=-1)

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
            draws: Of R positions. Without them the best logits win.
            n_probes: Clusters that are scored; None: the head's number.
            depth: Nats of the model's logits below the mass of all, from which kernels leave
                clusters out.
            logit_map: What the model does to each of its head's logits.
            adjustment: What biases and penalties change. The clusters of these tokens are scored,
                too.
            allowed: (R, ⌈V/32⌉) uint32, a bit a token, the lowest first, whether it may be chosen;
                None where all may. If no scored token may be, the position's risk is
                NOTHING_ALLOWED and its token is no choice: the dense rows have to choose at once.

        Returns:
            The tokens, with the scored tokens' logits by which they were chosen: as the model gives
            them, adjusted, and the lowest finite value of those that are not allowed.
        """
        if draws is None:
            draws = best_draws(len(hidden))
        if n_probes is None:
            n_probes = self._settings.n_probes
        adjusted = []
        if adjustment is not None:
            n_probes = min(n_probes + adjustment.n_tokens, self.n_clusters)
            adjusted = [adjustment.words, adjustment.latest]
        masks = []
        if allowed is not None:
            masks = [allowed]
        operations = self.operations
        structure, most_occurrences = operations.structure_of(draws, adjustment)
        function = ProposalFunction(
            operations=operations,
            risk=self.risk,
            n_probes=n_probes,
            depth=depth,
            structure=structure,
            logit_map=logit_map,
            most_occurrences=most_occurrences,
        )
        arrays = (hidden, draws.inputs, adjusted, masks)
        # MLX compiles the operations that it joins in a trace, about a second each on a CPU. Beside
        # a mask, which the host makes for each token, that does not pay.
        if allowed is None or self.backend == METAL:
            made = self._traced.of(function)(*arrays)
        else:
            made = function(*arrays)
        tokens, probes, logits, risk = made
        return Proposal(hidden, tokens, probes, logits, risk)

    def joined(
        self,
        proposals: Sequence[Proposal],
        positions: Sequence[ProposalPosition],
        tokens: Sequence[int],
    ) -> Proposal:
        """Positions of several proposals, with their ``tokens``, as one without risk."""
        most = max(proposal.probes.shape[1] for proposal in proposals)
        filled = [proposal.filled(most) for proposal in proposals]
        hidden, probes, logits = self.operations.join(filled, positions)
        chosen = mx.array(list(tokens), mx.uint32)
        return Proposal(hidden, chosen, probes, logits, mx.zeros(len(positions)))

    @property
    def joined_early(self) -> int:
        """Pending tokens that are joined before their verification's launch; 0: all at once."""
        return self.operations.joined_early

    def verify(
        self,
        proposal: Proposal,
        draws: Draws | None = None,
        *,
        logit_map: LogitMap = IDENTITY,
        allowed: mx.array | None = None,
        stretches: Sequence[Stretch] = (),
        sources: Sequence[Source] | None = None,
    ) -> Verdict:
        """Launches the verification of proposed tokens by the dense rows.

        Args:
            proposal: Of k positions.
            draws: As of :meth:`propose`, of k positions.
            logit_map: As of :meth:`propose`.
            allowed: As of :meth:`propose`, of k positions.
            stretches: What biases and penalties make of the distances of each position's logits;
                by default nothing.
            sources: Where the k states are that have been computed already; None: in the proposal.

        Returns:
            Says which tokens are accepted, and which are in doubt.
        """
        k = len(proposal.hidden)
        if draws is None:
            draws = best_draws(k)
        return Verdict(
            operations=self.operations,
            proposal=proposal,
            draws=draws,
            product=SlotProduct(self.operations, proposal.hidden, sources),
            rounding=self.rounding(proposal.hidden.dtype, k),
            stretches=stretches,
            logit_map=logit_map,
            allowed=allowed,
        )

    def rounding(self, dtype: mx.Dtype, k: int) -> Rounding:
        """The bounds for products of ``k`` states of ``dtype``, measured by now or else at once."""
        by_size = self.measure_rounding(dtype)
        for size, rounding in by_size.items():
            if size >= k:
                return rounding
        return by_size[max(by_size)]

    def measure_rounding(self, dtype: mx.Dtype) -> dict[int, Rounding]:
        """The bounds for products of states, by class of their number. Evaluates once."""
        if dtype not in self._roundings:
            self._roundings[dtype] = measure_rounding(self.operations, self.dense_logits, dtype)
        return self._roundings[dtype]

    def differs_in_batches(self, dtype: mx.Dtype) -> bool:
        """Whether a state's dense logits may be others in a product of several states.

        By more than float32's own rounding. ``dtype`` is that of the states.
        """
        return differs_in_batches(self.clustered.rows, dtype)
