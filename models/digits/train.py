"""Trains the two digit models, writes them as ONNX with their test set, and measures them.

Everything this writes lies beside it: digits-edge.onnx, digits-cloud.onnx, test.csv,
metrics.json, and the figures between the two markers of README.md.
"""

import hashlib
import json
import pathlib
import warnings

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, cross_val_predict, train_test_split
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

HERE = pathlib.Path(__file__).resolve().parent
SEED = 20
TEST, FOLDS = 750, 5
EDGE_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
CLOUD_MEMBERS, CLOUD_LAYERS, CLOUD_EPOCHS = 4, (256, 128), 60
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
MARKERS = ("<!-- figures, written by train.py: begin -->", "<!-- figures: end -->")
# Old enough for every runtime one meets, new enough for a Softmax over one axis.
OPSET, IR_VERSION = 13, 8


def split():
    """The training part and the test part, stratified. The test part is only ever measured."""
    digits = load_digits()
    images, labels = digits.data.astype(np.float32), digits.target
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=TEST, stratify=labels, random_state=SEED
    )
    return (train, train_labels), (test, test_labels)


def pooling():
    """The 64 x 16 matrix that averages 2 x 2 pixels and scales 0..16 to 0..1."""
    matrix = np.zeros((64, 16))
    for row in range(8):
        for column in range(8):
            matrix[row * 8 + column, (row // 2) * 4 + column // 2] = 0.25 / 16
    return matrix


def shifted(images):
    """The images, and each moved by one pixel up, down, left and right."""
    pictures = images.reshape(-1, 8, 8)
    copies = [pictures]
    for axis in (1, 2):
        for step in (1, -1):
            moved = np.roll(pictures, step, axis=axis)
            edge = 0 if step == 1 else 7
            if axis == 1:
                moved[:, edge, :] = 0
            else:
                moved[:, :, edge] = 0
            copies.append(moved)
    return np.concatenate(copies).reshape(-1, 64)


def softmax(scores):
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def train_edge(images, labels):
    """A logistic regression on 4 x 4 averages.

    Its strength and temperature are the ones that fit best where each image is judged by a
    model trained on the other folds: a separate validation part of this size is too noisy
    to calibrate ten classes.
    """
    pooled = images @ pooling()
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=SEED)
    candidates = []
    for strength in EDGE_STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=10_000)
        scores = cross_val_predict(model, pooled, labels, cv=folds, method="decision_function")
        fit = minimize_scalar(
            lambda t: log_loss(labels, softmax(scores / t)), bounds=(0.2, 5.0), method="bounded"
        )
        candidates.append((fit.fun, strength, float(fit.x)))
    _, strength, temperature = min(candidates)
    return LogisticRegression(C=strength, max_iter=10_000).fit(pooled, labels), temperature


def train_cloud(images, labels):
    """Four multi-layer perceptrons that differ by seed; their probabilities are averaged."""
    images = shifted(images) / np.float32(16)
    labels = np.tile(labels, 5)
    with warnings.catch_warnings():
        # The number of epochs is the plan, so running out of them is no news.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return [
            MLPClassifier(
                CLOUD_LAYERS, alpha=1e-3, max_iter=CLOUD_EPOCHS, random_state=SEED + member
            ).fit(images, labels)
            for member in range(CLOUD_MEMBERS)
        ]


class Graph:
    """An ONNX graph from `input` FP32 [N,64] to `probabilities` FP32 [N,10]."""

    def __init__(self):
        self.nodes, self.constants = [], []

    def constant(self, name, value):
        self.constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(self, operation, inputs, output, **attributes):
        self.nodes.append(helper.make_node(operation, inputs, [output], output, **attributes))
        return output

    def dense(self, source, name, weights, bias):
        inputs = [source, self.constant(name + ".weights", weights), self.constant(name + ".bias", bias)]
        return self.node("Gemm", inputs, name)

    def write(self, name, path):
        shape = lambda tensor, width: helper.make_tensor_value_info(tensor, TensorProto.FLOAT, ["N", width])
        graph = helper.make_graph(
            self.nodes, name, [shape("input", 64)], [shape("probabilities", 10)], self.constants
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        model.ir_version = IR_VERSION
        model.producer_name = "selvedge models/digits/train.py"
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString(deterministic=True))


def write_edge(model, temperature, path):
    graph = Graph()
    # Pooling, regression and temperature are all linear, so one matrix does the three.
    scores = graph.dense("input", "scores", pooling() @ model.coef_.T / temperature, model.intercept_ / temperature)
    graph.node("Softmax", [scores], "probabilities", axis=1)
    graph.write("digits-edge", path)


def write_cloud(members, path):
    graph = Graph()
    scaled = graph.node("Mul", ["input", graph.constant("scale", 1 / 16)], "scaled")
    total = None
    for index, member in enumerate(members):
        value = scaled
        for layer, (weights, bias) in enumerate(zip(member.coefs_, member.intercepts_)):
            value = graph.dense(value, f"member{index}.layer{layer}", weights, bias)
            if layer < len(CLOUD_LAYERS):
                value = graph.node("Relu", [value], f"member{index}.relu{layer}")
        value = graph.node("Softmax", [value], f"member{index}.probabilities", axis=1)
        total = value if total is None else graph.node("Add", [total, value], f"sum{index}")
    graph.node("Mul", [total, graph.constant("share", 1 / len(members))], "probabilities")
    graph.write("digits-cloud", path)


def run(path, images):
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(["probabilities"], {"input": images})[0]


def calibration_error(probabilities, labels, bins=10):
    """The expected gap between confidence and accuracy, over bins of equal width."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(confidence[places == b].mean() - right[places == b].mean()) * (places == b).mean()
        for b in range(bins)
        if (places == b).any()
    ]
    return float(sum(gaps))


def write_test_set(images, labels, path):
    header = ",".join(["label"] + [f"p{pixel}" for pixel in range(64)])
    rows = [",".join(map(str, [label, *image.astype(int)])) for label, image in zip(labels, images)]
    path.write_text("\n".join([header, *rows]) + "\n")


def measure(name, path, probabilities, labels):
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "correct": int((probabilities.argmax(axis=1) == labels).sum()),
        "accuracy": round(float((probabilities.argmax(axis=1) == labels).mean()), 4),
        "mean_confidence": round(float(probabilities.max(axis=1).mean()), 4),
        "calibration_error": round(calibration_error(probabilities, labels), 4),
    }


def cascade(edge, cloud, labels):
    rows = []
    for threshold in THRESHOLDS:
        escalated = edge.max(axis=1) < np.float32(threshold)
        answers = np.where(escalated, cloud.argmax(axis=1), edge.argmax(axis=1))
        rows.append(
            {
                "threshold": threshold,
                "escalated": int(escalated.sum()),
                "escalated_share": round(float(escalated.mean()), 4),
                "correct": int((answers == labels).sum()),
                "accuracy": round(float((answers == labels).mean()), 4),
            }
        )
    return rows


def figures(metrics):
    """The part of README.md between the markers."""
    percent = lambda share: f"{share * 100:.1f}%"
    lines = [
        f"Images: {metrics['train']} train, {metrics['test']} test.",
        "",
        "| model | size | right | accuracy | mean confidence | calibration error |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("edge", "cloud"):
        m = metrics[name]
        lines.append(
            f"| `{m['file']}` | {m['bytes'] / 1024:.1f} KiB | {m['correct']} of {metrics['test']} "
            f"| {percent(m['accuracy'])} | {m['mean_confidence']:.3f} | {m['calibration_error']:.3f} |"
        )
    lines += ["", "| escalate under | sent to the cloud | right | accuracy |", "|---|---|---|---|"]
    lines.append(f"| never (edge only) | 0.0% | {metrics['edge']['correct']} | {percent(metrics['edge']['accuracy'])} |")
    for row in metrics["cascade"]:
        lines.append(
            f"| {row['threshold']:.2f} | {percent(row['escalated_share'])} | {row['correct']} | {percent(row['accuracy'])} |"
        )
    lines.append(f"| always (cloud only) | 100.0% | {metrics['cloud']['correct']} | {percent(metrics['cloud']['accuracy'])} |")
    return "\n".join(lines)


def main():
    train, (images, labels) = split()
    edge, temperature = train_edge(*train)
    members = train_cloud(*train)

    edge_path, cloud_path = HERE / "digits-edge.onnx", HERE / "digits-cloud.onnx"
    write_edge(edge, temperature, edge_path)
    write_cloud(members, cloud_path)
    write_test_set(images, labels, HERE / "test.csv")

    by_edge, by_cloud = run(edge_path, images), run(cloud_path, images)
    expected_edge = softmax(edge.decision_function(images @ pooling()) / temperature)
    expected_cloud = np.mean([m.predict_proba(images / np.float32(16)) for m in members], axis=0)
    edge_gap = float(np.abs(by_edge - expected_edge).max())
    cloud_gap = float(np.abs(by_cloud - expected_cloud).max())
    assert edge_gap < 1e-5 and cloud_gap < 1e-5, f"the graphs differ from scikit-learn: {edge_gap}, {cloud_gap}"

    metrics = {
        "seed": SEED,
        "train": len(train[0]),
        "test": len(images),
        "test_sha256": hashlib.sha256((HERE / "test.csv").read_bytes()).hexdigest(),
        "edge_strength": edge.C,
        "edge_temperature": round(temperature, 4),
        "edge": measure("edge", edge_path, by_edge, labels),
        "cloud": measure("cloud", cloud_path, by_cloud, labels),
        "cascade": cascade(by_edge, by_cloud, labels),
    }
    (HERE / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")

    readme = HERE / "README.md"
    before, rest = readme.read_text().split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    readme.write_text(f"{before}{MARKERS[0]}\n{figures(metrics)}\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    # More threads would add the same numbers in another order, and the files would differ.
    with threadpool_limits(limits=1):
        main()
