from __future__ import annotations

import pytest
from tiny_tokenizers import EOS, byte_fallback_bpe, byte_level_bpe

from cacheflow.text import RequestAssembler, Tokenizer
from cacheflow.types import EngineRequest, RequestUpdate, SamplingParams, SequenceUpdate

TOKENIZER = Tokenizer(byte_level_bpe())


def encode(text):
    return TOKENIZER.encode(text)


def assembler(tokenizer=TOKENIZER, prompt="abc", **params):
    params.setdefault("max_tokens", None)
    request = EngineRequest(
        request_id="r", prompt_token_ids=tokenizer.encode(prompt), params=SamplingParams(**params), arrival_s=0.0
    )
    return RequestAssembler(tokenizer, request, prompt)


class Engine:
    """Makes the updates that an engine sends: token t of a sequence has log probability -(t + 1) / 8."""

    def __init__(self, *, with_logprobs=False):
        self.with_logprobs = with_logprobs
        self.sent = {}

    def sequence(self, ids, index=0, finish_reason=None, stop_reason=None, step=0.125):
        sent = self.sent.setdefault(index, [])
        new_logprobs = [{token_id: -step * (len(sent) + number + 1)} for number, token_id in enumerate(ids)]
        sent += [entry[token_id] for token_id, entry in zip(ids, new_logprobs, strict=True)]
        return SequenceUpdate(
            index=index,
            new_token_ids=list(ids),
            new_logprobs=new_logprobs if self.with_logprobs else None,
            cumulative_logprob=sum(sent),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def update(self, ids, finish_reason=None, stop_reason=None, **fields):
        sequence = self.sequence(ids, finish_reason=finish_reason, stop_reason=stop_reason)
        return RequestUpdate(request_id="r", sequences=[sequence], finished=finish_reason is not None, **fields)


def test_an_output_has_everything_so_far():
    request, engine = assembler(), Engine()
    first = request.apply(engine.update(encode("hello"), num_cached_tokens=3))
    second = request.apply(engine.update(encode(" wo"), "length"))
    assert (first.outputs[0].text, first.outputs[0].token_ids, first.finished) == ("hello", encode("hello"), False)
    assert (second.outputs[0].text, second.outputs[0].token_ids, second.finished) == ("hello wo", encode("hello wo"), True)
    assert second.outputs[0].finish_reason == "length"
    assert second.outputs[0].finished
    assert (second.prompt, second.prompt_token_ids, second.num_cached_tokens) == ("abc", encode("abc"), 3)


def test_an_output_that_was_given_out_never_changes():
    request, engine = assembler(prompt_logprobs=0, logprobs=0), Engine(with_logprobs=True)
    first = request.apply(engine.update(encode("hello"), new_prompt_logprobs=[None]))
    request.apply(engine.update(encode(" wo"), "length", new_prompt_logprobs=[{5: -1.0}]))
    assert first.outputs[0].token_ids == encode("hello")
    assert len(first.outputs[0].logprobs) == 1
    assert first.prompt_logprobs == [None]


def test_tokens_of_an_incomplete_character_are_held_with_it():
    request, engine = assembler(logprobs=0), Engine(with_logprobs=True)
    ids = encode("é😀")
    counts = [len(request.apply(engine.update([token_id])).outputs[0].token_ids) for token_id in ids]
    assert counts == [1] * (len(ids) - 1) + [len(ids)]


def test_a_running_output_agrees_in_text_tokens_and_log_probabilities():
    request, engine = assembler(logprobs=0, stop=["lowers"]), Engine(with_logprobs=True)
    for token_id in encode("he low lowe lo你好 l"):
        output = request.apply(engine.update([token_id])).outputs[0]
        assert TOKENIZER.decode(output.token_ids) == output.text
        assert len(output.logprobs) == len(output.token_ids)
        assert output.cumulative_logprob == sum(entry[i] for i, entry in zip(output.token_ids, output.logprobs, strict=True))
        assert not output.text.endswith("l")


def test_end_of_text_stays_in_the_tokens_and_out_of_the_text():
    request, engine = assembler(skip_special_tokens=False), Engine()
    output = request.apply(engine.update([*encode("hello"), EOS], "stop")).outputs[0]
    assert (output.text, output.token_ids) == ("hello", [*encode("hello"), EOS])
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_a_stop_token_stays_in_the_tokens_and_out_of_the_text():
    request, engine = assembler(stop_token_ids=encode(" wo")), Engine()
    output = request.apply(engine.update(encode("hello wo"), "stop", encode(" wo")[0])).outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == ("hello", encode("hello wo"), encode(" wo")[0])


def test_end_of_text_that_was_ignored_is_text_when_special_tokens_are_kept():
    request, engine = assembler(ignore_eos=True, skip_special_tokens=False), Engine()
    assert request.apply(engine.update([EOS, *encode("hello")], "length")).outputs[0].text == "</s>hello"


def test_a_stop_string_cuts_inside_a_token_and_keeps_that_token():
    request, engine = assembler(stop=["ll"], logprobs=0), Engine(with_logprobs=True)
    output = request.apply(engine.update(encode("a hello wo"))).outputs[0]
    ids = encode("a hello")
    assert (output.text, output.token_ids, output.finish_reason, output.stop_reason) == ("a he", ids, "stop", "ll")
    assert len(output.logprobs) == len(ids)
    assert output.cumulative_logprob == sum(-0.125 * (number + 1) for number in range(len(ids)))


def test_a_stop_string_can_be_kept_in_the_text():
    request, engine = assembler(stop=["ll"], include_stop_str_in_output=True), Engine()
    assert request.apply(engine.update(encode("hello"))).outputs[0].text == "hell"


def test_a_sequence_ended_by_a_stop_string_is_reported_once():
    request, engine = assembler(stop=["ll"]), Engine()
    output = request.apply(engine.update(encode("hello")))
    assert output.finished
    assert request.finished
    assert (request.take_stopped(), request.take_stopped()) == ([0], [])


def test_a_sequence_that_the_engine_ended_itself_needs_no_abort():
    request, engine = assembler(stop=["ll"]), Engine()
    output = request.apply(engine.update([*encode("hello"), EOS], "stop"))
    assert output.outputs[0].stop_reason == "ll"
    assert request.take_stopped() == []


def test_updates_behind_a_stop_string_change_nothing():
    request, engine = assembler(stop=["ll"]), Engine()
    output = request.apply(engine.update(encode("hello")))
    assert request.apply(engine.update(encode(" wo"), "abort")) == output


def test_what_might_have_become_a_stop_string_is_given_out_at_the_end():
    request, engine = assembler(stop=["hello wo"]), Engine()
    assert request.apply(engine.update(encode("hello"))).outputs[0].text == ""
    output = request.apply(engine.update(encode(" "), "length")).outputs[0]
    assert (output.text, output.token_ids, output.finish_reason) == ("hello ", encode("hello "), "length")


def test_a_stop_string_that_begins_inside_the_first_min_tokens_does_not_count():
    request, engine = assembler(stop=["b", "ca"], min_tokens=1), Engine()
    running = request.apply(engine.update(encode("abc")))
    assert running.outputs[0].text == "abc"
    assert request.apply(engine.update(encode("a"))).outputs[0].text == "abca"
    output = request.apply(engine.update(encode("b"))).outputs[0]
    assert (output.text, output.stop_reason) == ("abca", "b")


def test_a_character_begun_inside_the_first_min_tokens_begins_no_stop_string():
    request, engine = assembler(stop=["😀"], min_tokens=1), Engine()
    assert request.apply(engine.update(encode("😀"))).outputs[0].text == "😀"
    assert request.apply(engine.update(encode("a😀"))).outputs[0].text == "😀a"


def test_running_outputs_are_in_the_order_of_indices():
    request, engine = assembler(n=3), Engine()
    update = RequestUpdate(request_id="r", sequences=[engine.sequence(encode("hello"), index=2)], finished=False)
    assert [(o.index, o.text) for o in request.apply(update).outputs] == [(0, ""), (1, ""), (2, "hello")]


def test_a_request_ends_when_stop_strings_have_ended_all_its_sequences():
    request, engine = assembler(n=2, stop=["ll"]), Engine()
    both = [engine.sequence(encode("hello"), index=0), engine.sequence(encode("a"), index=1)]
    assert not request.apply(RequestUpdate(request_id="r", sequences=both, finished=False)).finished
    assert request.take_stopped() == [0]
    last = request.apply(RequestUpdate(request_id="r", sequences=[engine.sequence(encode("hello"), index=1)], finished=False))
    assert last.finished
    assert [o.text for o in last.outputs] == ["he", "ahe"]
    assert request.take_stopped() == [1]


def test_the_best_of_several_are_returned_by_mean_log_probability():
    request, engine = assembler(n=2, best_of=3), Engine()
    steps = {0: 0.5, 1: 0.125, 2: 0.25}
    running = [engine.sequence(encode("a"), index=i, step=step) for i, step in steps.items()]
    assert request.apply(RequestUpdate(request_id="r", sequences=running, finished=False)).outputs == []
    # Sequence 1 is the longest: its sum is not the highest, its mean is.
    last = [
        engine.sequence(encode("b" * (4 if i == 1 else 1)), index=i, finish_reason="length", step=0.1 * step)
        for i, step in steps.items()
    ]
    output = request.apply(RequestUpdate(request_id="r", sequences=last, finished=True))
    assert [(o.index, o.text) for o in output.outputs] == [(0, "abbbb"), (1, "ab")]
    assert output.outputs[0].cumulative_logprob / 5 > output.outputs[1].cumulative_logprob / 2


def test_beams_keep_the_engine_s_order_and_are_cut_by_stop_strings():
    request = assembler(n=2, best_of=3, use_beam_search=True, temperature=0.0, stop=["ll"])
    engine = Engine()
    beams = [engine.sequence(encode(text), index=i, finish_reason="length") for i, text in ((2, "hello"), (0, "ab"), (1, "h"))]
    output = request.apply(RequestUpdate(request_id="r", sequences=beams, finished=True))
    assert [(o.index, o.text, o.finish_reason) for o in output.outputs] == [(0, "he", "stop"), (1, "ab", "length")]
    assert request.take_stopped() == []


def test_beam_search_has_no_outputs_before_its_end():
    request = assembler(n=2, use_beam_search=True, temperature=0.0, prompt_logprobs=0)
    update = RequestUpdate(request_id="r", sequences=[], finished=False, new_prompt_logprobs=[None])
    output = request.apply(update)
    assert (output.outputs, output.finished, output.prompt_logprobs) == ([], False, [None])


def test_prompt_log_probabilities_accumulate_and_are_none_when_not_asked_for():
    request, engine = assembler(prompt_logprobs=1), Engine()
    request.apply(engine.update([], new_prompt_logprobs=[None, {5: -1.0}]))
    assert request.apply(engine.update([], new_prompt_logprobs=[{6: -2.0}])).prompt_logprobs == [None, {5: -1.0}, {6: -2.0}]
    assert assembler().apply(engine.update([])).prompt_logprobs is None


def test_an_error_ends_the_request_with_what_was_generated():
    request, engine = assembler(n=2, stop=["hello wo"]), Engine()
    both = [engine.sequence(encode("hello"), index=0), engine.sequence([*encode("b"), EOS], index=1, finish_reason="stop")]
    request.apply(RequestUpdate(request_id="r", sequences=both, finished=False))
    output = request.apply(RequestUpdate(request_id="r", sequences=[], finished=True, error="The engine broke."))
    assert (output.error, output.finished) == ("The engine broke.", True)
    assert [(o.text, o.finish_reason) for o in output.outputs] == [("hello", "error"), ("b", "stop")]


BEAMS = {"n": 2, "use_beam_search": True, "temperature": 0.0}


@pytest.mark.parametrize("params", [{}, {"n": 2}, {"n": 2, "best_of": 4}, BEAMS])
def test_a_request_that_failed_at_once_has_empty_outputs(params):
    update = RequestUpdate(request_id="r", sequences=[], finished=True, error="Too long.", is_invalid=True)
    output = assembler(**params).apply(update)
    assert [(o.index, o.text, o.token_ids, o.finish_reason) for o in output.outputs] == [
        (index, "", [], "error") for index in range(params.get("n", 1))
    ]


def test_an_aborted_request_holds_what_was_generated():
    request, engine = assembler(stop=["hello wo"]), Engine()
    request.apply(engine.update(encode("hello")))
    output = request.apply(RequestUpdate(request_id="r", sequences=[], finished=True))
    assert (output.outputs[0].text, output.outputs[0].finish_reason, output.error) == ("hello", "abort", None)


def test_a_generated_first_word_keeps_its_space():
    tokenizer = Tokenizer(byte_fallback_bpe())
    update = Engine().update(tokenizer.encode("hello", add_bos=False), "length")
    assert assembler(tokenizer).apply(update).outputs[0].text == " hello"
    assert assembler(tokenizer, prompt="").apply(update).outputs[0].text == "hello"
