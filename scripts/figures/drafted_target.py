"""The model that a drafter is trained for: what it writes, and its states."""

from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from tqdm import tqdm

from drafts import REQUESTS
from mlx_flashhead import get_flash_head, make_sampler
from mlx_flashhead.loading.drafts import load_draft
from mlx_flashhead.models.install import dense_copy

REQUEST_TOKENS = 40
REQUEST_HEAT = 1.0
# So many texts are written together.
BATCH = 32


class Text(NamedTuple):
    """An answer of the target.

    Attributes:
        heat: The temperature.
    """

    prompt: list[int]
    answer: list[int]
    heat: float
    seed: int


class Target:
    """A model whose states are drafted from.

    Args:
        path: A folder of mlx-lm's with a FlashHead.
    """

    def __init__(self, path: str):
        self.model, self.tokenizer = load_draft(path)
        head = get_flash_head(self.model)
        if head is None:
            raise ValueError(f"{path} has no FlashHead: convert it first.")
        self.head = head
        self._dense: Any = dense_copy(self.model)
        self.rows = head.clustered.token_rows().dequantized(mx.float32)
        self.args = self.model.args
        self.embed = self.model.model.embed_tokens
        mx.eval(self.rows)

    def write(self, prompts: list[list[int]], heat: float, n_tokens: int, seed: int) -> list[Text]:
        """Answers prompts, many at once."""
        texts = []
        for start in tqdm(range(0, len(prompts), BATCH), desc=f"Writing at {heat:g}"):
            of = prompts[start : start + BATCH]
            seeds = [seed + start + i for i in range(len(of))]
            texts += self._write(of, heat, n_tokens, seeds)
        return texts

    def _write(self, prompts, heat: float, n_tokens: int, seeds: list[int]) -> list[Text]:
        stop = [[token] for token in self.tokenizer.eos_token_ids]
        loop = BatchGenerator(self._dense, stop_tokens=stop, completion_batch_size=BATCH)
        samplers = [make_sampler(temp=heat, seed=seed) for seed in seeds]
        ids = loop.insert(prompts, [n_tokens for _ in prompts], samplers=samplers)
        answers: dict[int, list[int]] = {uid: [] for uid in ids}
        responses = loop.next_generated()
        while responses:
            for response in responses:
                answers[response.uid].append(response.token)
            responses = loop.next_generated()
        loop.close()
        pairs = zip(prompts, answers.values(), seeds, strict=True)
        return [Text(prompt, answer, heat, seed) for prompt, answer, seed in pairs]

    def states(self, tokens: list[int]) -> mx.array:
        """What the head is called with (n, D) after each of the tokens (n,)."""
        states = []

        def record(hidden: mx.array) -> mx.array:
            states.append(hidden)
            return mx.zeros((*hidden.shape[:-1], 1))

        with self.head.intercepted(record):
            self.model(mx.array([tokens]))
        return states[0][0].astype(mx.float32)

    def requests(self, n: int, seed: int) -> list[str]:
        """Requests that the target invents in a user's place."""
        messages = [{"role": "user", "content": "@@"}]
        template = self.tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = self.tokenizer.encode(template.split("@@")[0])
        given = {line.strip() for line in REQUESTS.read_text(encoding="utf-8").splitlines()}
        found: dict[str, None] = {}
        while len(found) < n:
            prompts = [prompt for _ in range(BATCH)]
            for text in self.write(prompts, REQUEST_HEAT, REQUEST_TOKENS, seed):
                request = self.tokenizer.decode(text.answer, skip_special_tokens=True).strip()
                if request and request not in given:
                    found[request] = None
            seed += BATCH
        return list(found)[:n]
