"""A model of MLServer, asked through the fabric with Triton's client."""

import sys
import time

import numpy as np
import tritonclient.grpc as triton

address, folder = sys.argv[1:]
headers = {"authorization": "Bearer " + open(f"{folder}/token").read()}
client = triton.InferenceServerClient(address)
until = time.monotonic() + 90
while not client.is_model_ready("mlserver/sum", headers=headers):
    assert time.monotonic() < until, "the model is not ready"
    time.sleep(0.2)
metadata = client.get_model_metadata("mlserver/sum", headers=headers)
assert metadata.inputs[0].name == "x", metadata
x = triton.InferInput("x", [4], "FP32")
x.set_data_from_numpy(np.array([1, 2, 3, 4.5], dtype=np.float32))
answer = client.infer("mlserver/sum", [x], headers=headers)
assert answer.as_numpy("sum").item() == 10.5, answer.get_response()
assert answer.get_response().parameters["tier"].string_param == "cloud"
print("ok: MLServer answers through the fabric")
