"""The inner names of mlx-lm's batches mean what `models/compat/inner_batch` takes them to mean."""

import pytest

from mlx_flashhead.models.compat import inner_batch
from mlx_flashhead.models.compat.mlx_lm import (
    BatchGenerator,
    GenerationBatch,
    PromptProcessingBatch,
    make_prompt_cache,
)
from tiny_models import tiny_model

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def model():
    return tiny_model()


def test_a_text_waits_with_what_it_was_inserted_with(model):
    generator = BatchGenerator(model)
    cache = make_prompt_cache(model)
    one = [lambda context, logits: logits]

    def sampler(logprobs):
        return logprobs.argmax(axis=-1)

    (uid,) = generator.insert_segments(
        [[PROMPT]],
        max_tokens=[3],
        caches=[cache],
        all_tokens=[[1, 2]],
        samplers=[sampler],
        logits_processors=[one],
    )
    (waiting,) = inner_batch.waiting_texts(generator)
    assert waiting.uid == uid
    assert [token for part in waiting.segments for token in part] == PROMPT
    assert waiting.max_tokens == 3
    assert waiting.cache is cache
    assert waiting.held == [1, 2]
    assert waiting.sampler is sampler
    assert list(waiting.processors) == one
    assert any(hasattr(waiting.stops, name) for name in ("matcher", "make_state"))


def test_the_next_text_has_the_next_number(model):
    generator = BatchGenerator(model)
    for _ in range(2):
        expected = inner_batch.next_uid(generator)
        assert generator.insert([PROMPT]) == [expected]
    inner_batch.number_from(generator, 17)
    assert generator.insert([PROMPT]) == [17]
    assert inner_batch.next_uid(generator) == 18


def test_a_text_is_read_and_then_decoded_in_what_is_put_there(model):
    generator = BatchGenerator(model)
    prompts = PromptProcessingBatch.empty(model, generator.sampler)
    texts = GenerationBatch.empty(model, generator.sampler)
    assert type(inner_batch.decoded_texts(generator)) is GenerationBatch
    inner_batch.set_prompts(generator, prompts)
    inner_batch.set_decoded_texts(generator, texts)
    assert inner_batch.decoded_texts(generator) is texts
    uids = generator.insert([PROMPT], [4])
    generator.next()
    assert prompts.uids + texts.uids == uids
    while not texts.uids:
        generator.next()
    assert (prompts.uids, texts.uids) == ([], uids)
    assert not list(inner_batch.waiting_texts(generator))


@pytest.mark.parametrize("name", ["next", "next_generated"])
def test_each_way_to_go_on_takes_the_step_of_the_public_name(model, name):
    class Counting(inner_batch.SteppedBatchGenerator):
        n_steps = 0

        def step(self):
            self.n_steps += 1
            return super().step()

    generator = Counting(model)
    generator.insert([PROMPT], [4])
    getattr(generator, name)()
    assert generator.n_steps > 0


def test_what_could_not_be_made_is_closed(model):
    generator = inner_batch.ClosableBatchGenerator.__new__(inner_batch.ClosableBatchGenerator)
    generator.close()
    assert "_old_wired_limit" in vars(BatchGenerator(model))
