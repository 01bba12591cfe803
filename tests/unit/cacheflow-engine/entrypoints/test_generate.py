"""What `cacheflow generate` reads and writes, without a model."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cacheflow.entrypoints.generate import Terminal, generate
from cacheflow.entrypoints.output_file import OutputFile
from cacheflow.entrypoints.prompt_file import Prompt, read_prompts, run_of, with_seeds
from cacheflow.entrypoints.sampling_options import OFF_THE_COMMAND_LINE
from cacheflow.errors import ConfigError
from cacheflow.types import CompletionOutput, RequestOutput, SamplingParams


def answer(text: str, prompt: str = "") -> RequestOutput:
    completion = CompletionOutput(
        index=0, text=text, token_ids=[5, 6], cumulative_logprob=-1.5, finish_reason="length", stop_reason=None
    )
    return RequestOutput(request_id="0", prompt=prompt, prompt_token_ids=[1, 2, 3], outputs=[completion], finished=True)


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(i, text, params=SamplingParams()) for i, text in enumerate(texts)]


def output_file(path: Path, prompts: list[Prompt]) -> OutputFile:
    return OutputFile(path, prompts, "some-model")


def read(tmp_path: Path, *entries: Any, **defaults: Any) -> list[Prompt]:
    file = tmp_path / "in.jsonl"
    file.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return read_prompts(file, defaults)


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "in.txt"
    file.write_bytes(b"one\r\n\n  two \nthree")
    assert [p.text for p in read_prompts(file, {})] == ["one", "  two ", "three"]


def test_a_lines_parameters_stand_beside_the_prompt_or_in_an_object_of_their_own(tmp_path: Path) -> None:
    one, two, three = read(
        tmp_path,
        {"prompt": "a", "id": "x", "temperature": 0.5},
        {"prompt": "b", "sampling_params": {"n": 2, "logit_bias": {"7": 1.5}}},
        {"prompt_token_ids": [4, 5]},
        temperature=0.25,
    )
    assert one.id == "x"
    assert one.params == SamplingParams(temperature=0.5)
    assert two.params == SamplingParams(temperature=0.25, n=2, logit_bias={7: 1.5})
    assert three.text == [4, 5]
    assert three.params == SamplingParams(temperature=0.25)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ({"text": "a"}, 'needs a "prompt"'),
        ({"prompt": 3}, 'needs a "prompt"'),
        ({"prompt": "a", "max_token": 3}, "Did you mean 'max_tokens'"),
        ({"prompt": "a", "temperature": -1}, "temperature must be"),
        ({"prompt": "a", "sampling_params": [1]}, "sampling_params must be an object"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_leaves_the_others_alone(tmp_path: Path, line: Any, complaint: str) -> None:
    good, bad, after = read(tmp_path, {"prompt": "a"}, line, {"prompt": "b"})
    assert good.error is None
    assert after.error is None
    assert bad.error is not None
    assert complaint in bad.error


def test_an_id_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given to two prompts"):
        read(tmp_path, {"prompt": "a", "id": 1}, {"prompt": "b", "id": 1})


def test_what_was_written_is_done(tmp_path: Path) -> None:
    path, prompts = tmp_path / "out.jsonl", prompts_of("a", "b", "c")
    first = output_file(path, prompts)
    first.write(prompts[2], answer("C"), None)
    first.write(prompts[0], answer("A"), None)
    first.close()
    assert output_file(path, prompts).done == {0, 2}
    line = json.loads(path.read_text().splitlines()[0])
    assert line == {
        "index": 2,
        "prompt": "c",
        "run": run_of(prompts[2], "some-model"),
        "num_prompt_tokens": 3,
        "outputs": [{"text": "C", "finish_reason": "length", "stop_reason": None, "num_tokens": 2, "cumulative_logprob": -1.5}],
    }


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path, prompts = tmp_path / "out.jsonl", prompts_of("a")
    output_file(path, prompts).write(prompts[0], answer("A"), None)
    assert path.read_text().endswith("}\n")


def test_any_torn_end_of_the_last_line_is_dropped(tmp_path: Path) -> None:
    path, prompts = tmp_path / "out.jsonl", prompts_of("é", "ü")
    file = output_file(path, prompts)
    for prompt in prompts:
        file.write(prompt, answer(str(prompt.text)), None)
    file.close()
    whole = path.read_bytes()
    first_line = whole[: whole.index(b"\n") + 1]
    for length in range(len(first_line), len(whole) - 1):
        path.write_bytes(whole[:length])
        file = output_file(path, prompts)
        file.close()
        assert file.done == {0}
        assert path.read_bytes() == first_line


def test_half_of_a_surrogate_pair_is_written_and_found_again(tmp_path: Path) -> None:
    path, prompts = tmp_path / "out.jsonl", read(tmp_path, '{"prompt": "\\ud800é"}')
    file = output_file(path, prompts)
    file.write(prompts[0], answer("A"), None)
    file.close()
    assert output_file(path, prompts).done == {0}


def test_an_output_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be written: No such file or directory"):
        output_file(tmp_path / "absent" / "out.jsonl", prompts_of("a"))


def test_a_last_line_that_only_lacks_its_newline_is_kept(tmp_path: Path) -> None:
    path, prompts = tmp_path / "out.jsonl", prompts_of("a", "b")
    output_file(path, prompts).write(prompts[0], answer("A"), None)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert output_file(path, prompts).done == {0}
    assert path.read_bytes() == whole


def test_a_failed_request_is_tried_again_even_if_its_line_was_corrected(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    bad = [Prompt(0, "{", error="The line is not JSON"), *prompts_of("", "b")[1:]]
    file = output_file(path, bad)
    file.write(bad[1], answer("B"), None)
    file.write(bad[0], None, bad[0].error)
    file.close()
    assert output_file(path, prompts_of("a", "b")).done == {1}
    assert len(path.read_text().splitlines()) == 1


def test_ids_find_their_prompts_in_another_order(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    before = [Prompt(0, "a", id="A"), Prompt(1, "b", id="B")]
    output_file(path, before).write(before[1], answer("b"), None)
    after = [Prompt(0, "b", id="B"), Prompt(1, "new", id="N"), Prompt(2, "a", id="A")]
    assert output_file(path, after).done == {0}


@pytest.mark.parametrize(
    "content",
    [
        "my notes\n",
        "my notes",
        '{"a": 1}\n',
        '{"index": 0}\n',
        '{"index": 0, "prompt": "b"}\n',
        '{"index": 9, "prompt": "a"}\n',
        '{"index": \n{"',
    ],
)
def test_a_file_that_is_not_this_runs_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match="left as it is"):
        output_file(path, prompts_of("a"))
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("params", "model"),
    [
        ({"max_tokens": 5}, "some-model"),
        ({"temperature": 0.5}, "some-model"),
        ({"seed": 1}, "some-model"),
        ({"stop": ["x"]}, "some-model"),
        ({}, "another-model"),
    ],
)
def test_texts_of_another_model_or_other_parameters_are_neither_taken_for_done_nor_changed(
    tmp_path: Path, params: dict[str, Any], model: str
) -> None:
    path = tmp_path / "out.jsonl"
    output_file(path, prompts_of("a")).write(prompts_of("a")[0], answer("A"), None)
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="Choose another --output, or delete it"):
        OutputFile(path, [Prompt(0, "a", params=SamplingParams(**params))], model)
    assert path.read_bytes() == content


def test_every_parameter_can_be_hashed_and_the_order_of_entries_does_not_count() -> None:
    one = SamplingParams(logit_bias={1: 2.0, 30: 4.0}, extra={"a": [1, None], "\ud800": "é"}, allowed_token_ids=[3])
    other = SamplingParams(logit_bias={30: 4.0, 1: 2.0}, extra={"\ud800": "é", "a": [1, None]}, allowed_token_ids=[3])
    assert run_of(Prompt(0, "a", params=one), "m") == run_of(Prompt(7, "b", params=other), "m")


def seeds_of(prompts: list[Prompt], seed: int) -> list[int | None]:
    return [p.params.seed if p.params else None for p in with_seeds(prompts, seed)]


def test_a_seed_follows_from_the_runs_seed_and_the_prompts_place() -> None:
    prompts = prompts_of("a", "a", "a")
    seeds = seeds_of(prompts, 0)
    assert len(set(seeds)) == 3
    assert seeds_of(prompts[1:], 0) == seeds[1:]
    assert not set(seeds_of(prompts, 1)) & set(seeds)
    assert seeds[0] == 6168997292806018030  # of every version and on every machine


def test_a_seed_follows_an_id_into_another_order_and_a_given_seed_stays() -> None:
    a, b = Prompt(0, "x", id=1, params=SamplingParams()), Prompt(1, "x", id="b", params=SamplingParams())
    swapped = [Prompt(0, "x", id="b", params=b.params), Prompt(1, "x", id=1, params=a.params)]
    assert seeds_of([a, b], 3) == seeds_of(swapped, 3)[::-1]
    assert seeds_of([Prompt(0, "x", params=SamplingParams(seed=7))], 3) == [7]


def test_the_terminal_prints_in_the_order_of_the_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = prompts_of("a", "b", "c")
    terminal = Terminal(prompts)
    terminal.write(prompts[2], answer("C"), None)
    assert capsys.readouterr().out == ""
    terminal.write(prompts[0], answer("A"), None)
    assert capsys.readouterr().out == "Prompt: 'a', Generated text: 'A'\n"
    terminal.close()
    assert capsys.readouterr().out == "Prompt: 'c', Generated text: 'C'\n"


def test_every_sampling_parameter_is_an_option_with_a_help() -> None:
    options = {parameter.name: parameter for parameter in generate.params}
    for entry in fields(SamplingParams):
        if entry.name not in OFF_THE_COMMAND_LINE:
            assert getattr(options[entry.name], "help", None), entry.name


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "cacheflow generate --model demo"),
        (["a", "--input", "b.txt"], "either prompts or --input"),
        (["a", "--block-size", "0"], "--block-size must be from 1 to 256"),
        (["a", "--temperature", "-1"], "temperature must be a number from 0 to 100"),
        (["a", "--use-np-weights"], "safetensors files are memory-mapped"),
        (["a", "--worker-use-ray"], "chosen with --executor"),
        (["a", "--engine-use-ray"], "`cacheflow engine`"),
    ],
)
def test_wrong_usage_says_what_to_do(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(generate, arguments)
    assert result.exit_code == 2
    assert complaint in result.output


def test_a_file_without_prompts_is_wrong_usage(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    result = CliRunner().invoke(generate, ["--input", str(empty)])
    assert result.exit_code == 2
    assert "holds no prompts" in result.output
