"""Clients that nobody here wrote, each in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import export
from mistill.chat.bot import ChatBot
from tests.mistill.serve.running import RunningServer, running
from tests.mistill.serve.test_forms import HERMES
from tests.tiny import SENTENCES, tiny_model

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.network]
QUESTION = "What is the weather like today?"


def environment(folder: Path, *packages: str) -> str:
    """The Python of a new environment with packages from the index."""
    # Named by hand where one is at hand, so as not to build it anew.
    existing = os.environ.get(f"MISTILL_{folder.name.upper()}_VENV")
    if existing:
        return str(Path(existing) / "bin" / "python")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--python", folder, "install", *packages], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"pip installs no {packages[0]}: {done.stderr.strip().splitlines()[-1]}")
    return str(folder / "bin" / "python")


def run(python: str, code: str, *arguments: object, **variables: str) -> Any:
    """What a program prints last, as JSON."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "OPENAI_"))
    }
    done = subprocess.run(
        [python, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**clean, "NO_PROXY": "127.0.0.1", **variables},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def talkative(chatbot: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose chat template knows tools."""
    from tests.mistill.serve.running import with_template

    folder = with_template(chatbot, tmp_path_factory.mktemp("clients") / "tiny-bot", HERMES)
    with running(folder) as one:
        yield one


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("environments") / "openai"
    return environment(folder, "openai", "langchain-openai", "litellm")


@pytest.fixture(scope="module")
def expected(chatbot: Path) -> str:
    bot = ChatBot(chatbot, temperature=0, max_new_tokens=16, threads=1)
    return "".join(bot.reply(QUESTION))


def test_openai(clients: str, talkative: RunningServer, expected: str) -> None:
    code = """
    import json, sys
    import openai
    from pydantic import BaseModel

    class Person(BaseModel):
        age: int
        likes_cats: bool

    url, question = sys.argv[1:]
    client = openai.OpenAI(base_url=url, api_key="any", max_retries=0)
    (model,) = [model.id for model in client.models.list()]
    asked = dict(model=model, messages=[{"role": "user", "content": question}], temperature=0)
    found = {"model": client.models.retrieve(model).id}
    whole = client.chat.completions.create(**asked, max_tokens=16)
    found["whole"] = whole.choices[0].message.content
    found["usage"] = whole.usage.total_tokens
    found["request_id"] = whole._request_id
    chunks = list(client.chat.completions.create(
        **asked, max_tokens=16, stream=True, stream_options={"include_usage": True}))
    found["stream"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    found["stream_usage"] = chunks[-1].usage.total_tokens
    with client.chat.completions.stream(**asked, max_tokens=16) as stream:
        events = list(stream)
    found["helper"] = "".join(event.delta for event in events if event.type == "content.delta")
    found["events"] = sorted({event.type for event in events})
    parsed = client.chat.completions.parse(
        **{**asked, "temperature": 1}, max_tokens=80, seed=1, response_format=Person,
        logit_bias={})
    found["parsed"] = type(parsed.choices[0].message.parsed).__name__
    found["parsed_reason"] = parsed.choices[0].finish_reason
    completion = client.completions.create(
        model=model, prompt=["The", "A"], max_tokens=4, temperature=0, logprobs=2, echo=True)
    found["completion"] = [choice.text[:3] for choice in completion.choices]
    found["logprobs"] = len(completion.choices[0].logprobs.tokens)
    scored = client.chat.completions.create(
        **asked, max_tokens=3, logprobs=True, top_logprobs=2)
    found["top"] = len(scored.choices[0].logprobs.content[0].top_logprobs)
    called = client.chat.completions.create(
        **{**asked, "temperature": 1}, seed=2, max_tokens=200, tool_choice="required",
        tools=[{"type": "function", "function": {"name": "now", "parameters": {
            "type": "object", "properties": {"utc": {"type": "boolean"}},
            "required": ["utc"], "additionalProperties": False}}}])
    found["tool"] = called.choices[0].message.tool_calls[0].function.name
    found["arguments"] = type(json.loads(
        called.choices[0].message.tool_calls[0].function.arguments)["utc"]).__name__
    for name, call in {
        "BadRequestError": lambda: client.chat.completions.create(**{**asked, "temperature": 9}),
        "NotFoundError": lambda: client.chat.completions.create(**{**asked, "model": "other"}),
        "embeddings": lambda: client.embeddings.create(model=model, input="a"),
    }.items():
        try:
            call()
        except openai.APIStatusError as error:
            found[name] = [type(error).__name__, error.status_code, error.param, error.code,
                           bool(error.request_id)]
    print(json.dumps(found))
    """
    found = run(clients, code, f"http://127.0.0.1:{talkative.port}/v1", QUESTION)
    assert found["model"] == "tiny-bot"
    assert found["whole"] == found["stream"] == found["helper"] == expected
    assert found["usage"] == found["stream_usage"]
    assert {"chunk", "content.delta", "content.done"} <= set(found["events"])
    assert found["request_id"]
    assert found["parsed"] == "Person"
    assert found["parsed_reason"] == "stop"
    assert found["completion"] == ["The", "A" + found["completion"][1][1:]]
    assert found["logprobs"] >= 5
    assert found["top"] == 2
    assert (found["tool"], found["arguments"]) == ("now", "bool")
    assert found["BadRequestError"] == ["BadRequestError", 400, "temperature", None, True]
    assert found["NotFoundError"] == ["NotFoundError", 404, "model", "model_not_found", True]
    assert found["embeddings"][:2] in (["NotFoundError", 404], ["BadRequestError", 400])


def test_langchain(clients: str, talkative: RunningServer, expected: str) -> None:
    code = """
    import json, sys
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    class Person(BaseModel):
        age: int
        likes_cats: bool

    url, question = sys.argv[1:]
    chat = ChatOpenAI(base_url=url, api_key="any", model="tiny-bot", temperature=0, max_tokens=16)
    answer = chat.invoke([("system", "x"), ("user", question)])
    found = {"reason": answer.response_metadata["finish_reason"]}
    found["whole"] = chat.invoke(question).content
    found["stream"] = "".join(chunk.content for chunk in chat.stream(question))
    found["batch"] = [one.content for one in chat.batch([question] * 3)]
    shaped = ChatOpenAI(base_url=url, api_key="any", model="tiny-bot", temperature=1, seed=1,
                        max_tokens=80).with_structured_output(Person, method="json_schema")
    found["shaped"] = type(shaped.invoke(question)).__name__
    print(json.dumps(found))
    """
    found = run(clients, code, f"http://127.0.0.1:{talkative.port}/v1", QUESTION)
    assert found["whole"] == found["stream"] == expected
    assert found["batch"] == [expected] * 3
    assert found["reason"] in ("stop", "length")
    assert found["shaped"] == "Person"


def test_litellm(clients: str, talkative: RunningServer, expected: str) -> None:
    code = """
    import json, sys
    import litellm

    url, question = sys.argv[1:]
    litellm.telemetry = False
    asked = dict(messages=[{"role": "user", "content": question}], api_base=url, api_key="any",
                 temperature=0, max_tokens=16)
    found = {}
    for provider in ("openai", "hosted_vllm"):
        answer = litellm.completion(model=f"{provider}/tiny-bot", **asked)
        stream = litellm.completion(model=f"{provider}/tiny-bot", stream=True, **asked)
        found[provider] = [
            answer.choices[0].message.content,
            "".join(chunk.choices[0].delta.content or "" for chunk in stream),
        ]
    try:
        litellm.completion(model="openai/other", **asked)
    except litellm.exceptions.NotFoundError:
        found["other"] = "not found"
    print(json.dumps(found))
    """
    found = run(
        clients,
        code,
        f"http://127.0.0.1:{talkative.port}/v1",
        QUESTION,
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    assert found["openai"] == found["hosted_vllm"] == [expected, expected]
    assert found["other"] == "not found"


# --- lm-evaluation-harness ------------------------------------------------------------------------

CHOICE = """\
task: winds
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{answers}}}}"
doc_to_target: right
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """\
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
REPLY = """\
task: replies
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{reply}}}}"
generation_kwargs: {{until: ["\\n\\n", "?"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
EVALUATE = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
import benchmarks.harness_model

folder, url, tasks = sys.argv[1:]
manager = TaskManager(include_path=tasks, include_defaults=False)
remote = dict(model="tiny-bot", base_url=f"{url}/v1/completions", tokenizer_backend="remote",
              num_concurrent=1, max_retries=1, tokenized_requests=True)
ways = {
    "ours": ("mistill", dict(folder=folder, threads=1), False),
    "completions": ("local-completions", remote, False),
    "ours in chat": ("mistill", dict(folder=folder, threads=1), True),
    "chat": ("local-chat-completions",
             dict(model="tiny-bot", base_url=f"{url}/v1/chat/completions", max_retries=1), True),
}
found = {}
for name, (model, arguments, chat) in ways.items():
    result = lm_eval.simple_evaluate(
        model=model, model_args=arguments, task_manager=manager, log_samples=True,
        tasks=["replies"] if chat else ["winds", "rolling", "replies"], apply_chat_template=chat)
    found[name] = {
        "scores": {task: {k: v for k, v in scores.items() if isinstance(v, float)}
                   for task, scores in result["results"].items()},
        "answers": {task: [sample["resps"] for sample in samples]
                    for task, samples in result["samples"].items()},
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-eval finds of one folder in process and through the server."""
    place = tmp_path_factory.mktemp("judged")
    python = environment(
        place / "lm_eval",
        *("lm-eval[api]>=0.4.13", "onnxruntime", "tokenizers", "jinja2", "msgspec", "safetensors"),
        *("cyclopts", "rich", "numpy"),
    )
    source = tiny_model(place / "model", seed=2, scale=0.3)
    folder = export.to_onnx(source, place / "tiny-bot", parity_positions=0)
    rows = [
        {
            "question": f"{SENTENCES[number % 4]} {number}",
            "answers": [f" answer {choice} {number}" for choice in ("one", "two", "three")],
            "right": number % 3,
            "reply": SENTENCES[number % 3],
            "text": " ".join(SENTENCES[: 1 + number % 4]),
        }
        for number in range(24)
    ]
    tasks = place / "tasks"
    tasks.mkdir()
    file = tasks / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, task in (("winds", CHOICE), ("rolling", ROLLING), ("replies", REPLY)):
        (tasks / f"{name}.yaml").write_text(task.format(file=file), "utf-8")
    # An export is sampled with penalties, which evaluations in process do not heed.
    plain: dict[str, Any] = {"min_p": 0.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    with running(folder, **plain, dry_multiplier=0.0) as server:
        found: dict[str, Any] = run(
            python,
            EVALUATE,
            folder,
            f"http://127.0.0.1:{server.port}",
            tasks,
            PYTHONPATH=str(ROOT),
            HF_HOME=str(place / "home"),
            HF_HUB_OFFLINE="1",
            HF_DATASETS_OFFLINE="1",
            OPENAI_API_KEY="any",
        )
    return found


@pytest.mark.parametrize("task", ["winds", "rolling"])
def test_lm_eval_scores_through_the_server_as_in_process(judged: dict[str, Any], task: str) -> None:
    ours, theirs = judged["ours"], judged["completions"]
    # Through the server a text is read with its last token too, and kernels round by the number of
    # positions that they are given: single sums may differ in their seventh digit.
    assert numbers(theirs["answers"][task]) == pytest.approx(
        numbers(ours["answers"][task]), rel=1e-6
    )
    assert theirs["scores"][task] == pytest.approx(ours["scores"][task], rel=1e-6)
    if task == "winds":
        assert theirs["scores"][task] == ours["scores"][task]
        assert 0 < ours["scores"][task]["acc,none"] < 1


def numbers(answers: Any) -> list[float]:
    """Log-probabilities, and 0 or 1 for whether greedy decoding writes the answer."""
    if isinstance(answers, list):
        return [number for answer in answers for number in numbers(answer)]
    return [float({"True": 1, "False": 0}.get(str(answers), answers))]


@pytest.mark.parametrize(("here", "there"), [("ours", "completions"), ("ours in chat", "chat")])
def test_lm_eval_gets_the_same_replies_through_the_server(
    judged: dict[str, Any], here: str, there: str
) -> None:
    assert judged[there]["answers"]["replies"] == judged[here]["answers"]["replies"]
    assert judged[there]["scores"]["replies"] == judged[here]["scores"]["replies"]
