"""Unmodified clients against the front door of `selvedge dev`; see run.sh."""

import json
import queue
import sys
import time

import numpy as np
import openai
import tritonclient.grpc as grpc
import tritonclient.http as http
from tritonclient.utils import InferenceServerException

GRPC, HTTP, FOLDER = sys.argv[1:]
TOKEN = open(f"{FOLDER}/token").read()
AUTH = {"authorization": f"Bearer {TOKEN}"}
REQUEST = json.load(open(f"{FOLDER}/models/digit.json"))["inputs"][0]
DIGIT = np.array(REQUEST["data"], dtype=np.float32).reshape(1, 64)


def auth():
    # Triton's HTTP client writes into the headers it is given.
    return dict(AUTH)


def refused(what, call, *kinds):
    try:
        call()
    except kinds or InferenceServerException as error:
        return error
    raise AssertionError(f"{what} was not refused")


def step(name):
    print(f"ok: {name}", flush=True)


def of_grpc(name="input"):
    tensor = grpc.InferInput(name, [1, 64], "FP32")
    tensor.set_data_from_numpy(DIGIT)
    return [tensor]


def triton_grpc():
    client = grpc.InferenceServerClient(GRPC)
    assert client.is_server_live() and client.is_server_ready()
    error = refused("no token", client.get_server_metadata)
    assert error.status() == "StatusCode.UNAUTHENTICATED", error
    assert client.get_server_metadata(headers=AUTH).name == "broker"
    assert client.is_model_ready("digits", headers=AUTH)
    assert not client.is_model_ready("nothing", headers=AUTH)
    metadata = client.get_model_metadata("digits", headers=AUTH)
    assert list(metadata.inputs[0].shape) == [-1, 64]
    config = client.get_model_config("digits", headers=AUTH).config
    assert config.input[0].data_type == 11, config
    assert "digits" in [m.name for m in client.get_model_repository_index(headers=AUTH).models]
    step("tritonclient.grpc: health, metadata, configuration, index")

    answer = client.infer(
        "digits", of_grpc(), headers=AUTH, request_id="r-1", priority=1, timeout=5_000_000,
        outputs=[grpc.InferRequestedOutput("probabilities")], parameters={"min_confidence": 0.9},
    )
    assert answer.as_numpy("probabilities").argmax() == 0
    response = answer.get_response()
    assert response.id == "r-1"
    assert response.parameters["tier"].string_param == "cloud"
    assert response.parameters["reason"].string_param.startswith("escalated")
    near = client.infer("digits", of_grpc(), headers=AUTH, parameters={"residency": "site"})
    assert near.get_response().parameters["tier"].string_param == "edge"
    step("tritonclient.grpc: infer, cascade, residency, explanation")

    for call, code in [
        (lambda: client.infer("digits", of_grpc("x"), headers=AUTH), "INVALID_ARGUMENT"),
        (lambda: client.infer("digits", of_grpc(), headers=AUTH, model_version="9"), "NOT_FOUND"),
        (lambda: client.infer("digits", of_grpc(), headers=AUTH, parameters={"residency": "x"}),
         "INVALID_ARGUMENT"),
        (lambda: client.infer("slow", of_grpc(), headers=AUTH, client_timeout=0.3),
         "DEADLINE_EXCEEDED"),
        (lambda: client.infer("slow", of_grpc(), headers=AUTH, timeout=300_000),
         "DEADLINE_EXCEEDED"),
    ]:
        error = refused(code, call)
        assert error.status() == f"StatusCode.{code}", error
    step("tritonclient.grpc: refusals and deadlines")

    done = queue.Queue()
    call = client.async_infer(
        "slow", of_grpc(), lambda result, error: done.put(error), headers=AUTH)
    time.sleep(0.3)
    call.cancel()
    assert "CANCELLED" in str(done.get(timeout=5))
    # The only slot of the model is free again, so that this waits for its own deadline alone.
    begun = time.monotonic()
    refused("slow", lambda: client.infer("slow", of_grpc(), headers=AUTH, timeout=300_000))
    assert time.monotonic() - begun < 2
    step("tritonclient.grpc: cancellation")

    results = queue.Queue()
    client.start_stream(lambda result, error: results.put((result, error)), headers=AUTH)
    for number in range(20):
        model = "digits" if number != 7 else "nothing"
        client.async_stream_infer(model, of_grpc(), request_id=str(number), timeout=5_000_000,
                                  enable_empty_final_response=number == 19)
    for number in range(20):
        result, error = results.get(timeout=10)
        if number == 7:
            assert "NOT_FOUND" in str(error), error
        else:
            assert error is None and result.get_response().id == str(number), error
    result, error = results.get(timeout=10)
    assert result.get_response().parameters["triton_final_response"].bool_param
    client.stop_stream()
    step("tritonclient.grpc: streaming")


def triton_http():
    client = http.InferenceServerClient(HTTP)
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("digits", headers=auth())
    assert not client.is_model_ready("nothing", headers=auth())
    assert client.get_server_metadata(headers=auth())["name"] == "broker"
    assert client.get_model_metadata("digits", headers=auth())["versions"] == ["1"]
    assert client.get_model_config("digits", headers=auth())["max_batch_size"] == 0
    assert client.get_model_repository_index(headers=auth())
    for binary_in in (True, False):
        for binary_out in (True, False):
            tensor = http.InferInput("input", [1, 64], "FP32")
            tensor.set_data_from_numpy(DIGIT, binary_data=binary_in)
            output = http.InferRequestedOutput("probabilities", binary_data=binary_out)
            answer = client.infer("digits", [tensor], outputs=[output], headers=auth(),
                                  parameters={"prefer": "cloud"})
            assert answer.as_numpy("probabilities").argmax() == 0
            assert answer.get_response()["parameters"]["tier"] == "cloud"
    error = refused("version", lambda: client.infer(
        "digits", [tensor], model_version="9", headers=auth()))
    assert error.status() == "404", error
    error = refused("no token", lambda: client.infer("digits", [tensor]))
    assert error.status() == "401", error
    step("tritonclient.http: health, metadata, infer in JSON and binary, refusals")


def open_ai():
    client = openai.OpenAI(base_url=f"http://{HTTP}/v1", api_key=TOKEN, max_retries=0)
    ids = [model.id for model in client.models.list()]
    assert {"digits", "echo"} <= set(ids), ids
    messages = [{"role": "user", "content": "one two three"}]
    answer = client.chat.completions.with_raw_response.create(model="echo", messages=messages)
    assert answer.headers["x-selvedge-tier"] == "edge"
    assert answer.parse().choices[0].message.content == "one two three"
    stream = client.chat.completions.create(model="echo", messages=messages, stream=True)
    words = [chunk.choices[0].delta.content for chunk in stream]
    assert words == ["one ", "two ", "three"], words
    step("openai: models, chat, streaming")

    stream = client.chat.completions.create(
        model="echo", stream=True,
        messages=[{"role": "user", "content": " ".join(["slowly"] * 1000)}])
    next(iter(stream))
    begun = time.monotonic()
    stream.close()
    # It has one slot, which is free as soon as the worker has stopped.
    client.chat.completions.create(model="echo", messages=messages, timeout=5)
    assert time.monotonic() - begun < 3
    step("openai: closing a stream stops the worker")

    error = refused("no such model", lambda: client.chat.completions.create(
        model="digits", messages=messages), openai.BadRequestError)
    assert "Open Inference Protocol" in str(error), error
    error = refused("bad key", lambda: openai.OpenAI(
        base_url=f"http://{HTTP}/v1", api_key="x", max_retries=0).models.list(),
        openai.AuthenticationError)
    error = refused("deadline", lambda: client.chat.completions.create(
        model="slow", messages=messages, extra_headers={"x-selvedge-deadline-ms": "300"}),
        openai.APIStatusError)
    assert error.status_code == 504, error
    error = refused("overload", lambda: client.chat.completions.create(
        model="full", messages=messages), openai.RateLimitError)
    assert error.response.headers["x-should-retry"] == "true"
    step("openai: refusals, deadline, overload")


triton_grpc()
triton_http()
open_ai()
