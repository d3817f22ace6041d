"""Task agreement: each measure against scikit-learn's or SciPy's, and what happens where a task cannot be measured."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, jaccard_score, top_k_accuracy_score
from sklearn.neighbors import NearestNeighbors

from fna.errors import InputFileError
from fna.export.sources.loading import load_model
from fna.export.trace import TraceOptions, export_onnx
from fna.plan import FocalBlockPlan, Plan, uniform_plan
from fna.validate.budget.chain import DEPLOYED, EXACT, open_chain, open_validated_file
from fna.validate.budget.measure import measure_chain, prefix_of
from fna.validate.photographs import Photographs, load_labelled
from fna.validate.task.classification import match_labels, measure_classification, top_agreement
from fna.validate.task.digits_probe import shrink_plan
from fna.validate.task.inputs import ImageVectors, OutputKinds, TaskInputs
from fna.validate.task.linear_probe import hold_out, probe
from fna.validate.task.measure import TASKS, compare_outputs, measure_tasks
from fna.validate.task.results import Results
from fna.validate.task.retrieval import neighbour_recall
from fna.validate.task.saliency import intersection_over_union
from fna.validate.task.segmentation import mean_iou

RANDOM = np.random.default_rng(0)


def quietly(*_progress: object) -> None:
    """Say nothing."""


def test_recall_is_scikit_learns_neighbours_in_common() -> None:
    exact, fna = RANDOM.standard_normal((30, 8)), RANDOM.standard_normal((30, 8))
    fna = exact + 0.5 * fna
    for k in (1, 5, 10):
        found = []
        for vectors in (exact, fna):
            neighbours = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(vectors)
            found.append(neighbours.kneighbors(vectors, return_distance=False)[:, 1:])
        expected = np.mean([len(set(left) & set(right)) / k for left, right in zip(*found, strict=True)])
        assert neighbour_recall(exact, fna, k) == pytest.approx(expected)
    assert neighbour_recall(exact, 3 * exact, 5) == 1


def test_top_k_agreement_is_scikit_learns_accuracy_against_the_exact_class() -> None:
    exact, fna = RANDOM.standard_normal((40, 9)), RANDOM.standard_normal((40, 9))
    for k in (1, 5):
        expected = top_k_accuracy_score(exact.argmax(axis=1), fna, k=k, labels=range(9))
        assert top_agreement(exact, fna, k) == pytest.approx(expected)


def test_mean_iou_is_scikit_learns_jaccard() -> None:
    left, right = RANDOM.integers(0, 4, 500), RANDOM.integers(0, 4, 500)
    assert mean_iou(left, right) == pytest.approx(jaccard_score(left, right, average="macro"))
    assert intersection_over_union(left > 1, right > 1) == pytest.approx(jaccard_score(left > 1, right > 1))
    assert intersection_over_union(left > 9, right > 9) == 1


def test_a_probe_sees_what_is_linearly_there_and_loses_what_is_not() -> None:
    truth = np.arange(120) % 3
    features = np.eye(3)[truth] + 0.1 * RANDOM.standard_normal((120, 3))
    train, test = hold_out(truth, np.arange(3))
    assert not set(train) & set(test)
    scores = probe(features, features[:, ::-1], truth, train, test)
    assert scores.exact == 1
    assert scores.fna == pytest.approx(1 / 3, abs=0.1)  # classes 0 and 2 change places
    assert scores.retrained == 1
    assert scores.agreement == scores.fna


def test_a_smaller_image_gets_landmarks_in_proportion() -> None:
    plan = uniform_plan(12, layers="6-11", landmarks=128, prefix_tokens=1)
    assert {entry.landmarks for entry in shrink_plan(plan, (7, 7), 1369).blocks} == {6}
    assert {entry.landmarks for entry in shrink_plan(plan, (1, 3), 1369).blocks} == {3}


def test_a_focal_block_has_fewer_hot_keys_and_fitting_tiles_on_smaller_images() -> None:
    focal = FocalBlockPlan(block=1, tile=8, levels=((1, 0), (2, 2)), hot=64, seed=1)
    plan = Plan(num_blocks=2, focal=(focal,), prefix_tokens=1, patches=(37, 37))
    small = shrink_plan(plan, (7, 9), 37 * 37)
    assert small.patches == (7, 9)
    assert small.focal[0] == focal.model_copy(update={"tile": 7, "hot": 3})


def test_labels_are_the_models_names_or_numbers() -> None:
    names = {"tabby": 0, "tabby cat": 0, "dog": 1}
    assert match_labels(["Tabby", "dog", "2"], names, 3).tolist() == [0, 1, 2]
    with pytest.raises(
        InputFileError, match="class folder 'wolf' is no class of the model, which has 3 .*such as: dog"
    ):
        match_labels(["wolf"], names, 3)
    with pytest.raises(InputFileError, match="'3' is no class"):
        match_labels(["3"], names, 3)


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    for name, colour in (("0", 0), ("1", 128), ("2", 255)):
        (tmp_path / name).mkdir()
        for index in range(4):
            noise = RANDOM.integers(0, 40, (30, 30, 3)) - 20
            pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    return tmp_path


def measure_file(path: Path, photographs: Photographs, digits: int = 80):
    chain = open_chain(open_validated_file(path), None, quietly)
    _, outputs = measure_chain(chain, photographs.images, tolerances={}, on_step=quietly)
    return chain, outputs, measure_tasks(chain, DEPLOYED, photographs, outputs, quietly, digits=digits)


def test_a_backbone_with_class_folders_gets_a_linear_probe(tiny, class_folders: Path) -> None:
    photographs = load_labelled(class_folders)
    _, _, result = measure_file(tiny.file("fp32"), photographs)
    assert result.find("classification", "accuracy, exact") == 1
    assert result.find("classification", "accuracy, FNA") == 1
    assert 0 < result.find("retrieval", "recall@5") <= 1
    assert 0 < result.find("segmentation", "mIoU") <= 1
    assert 0.1 < result.find("digits probe", "accuracy, exact") < 1
    assert any("no map output" in line for line in result.skipped)


def test_few_images_get_crops_and_the_tasks_say_so(tiny) -> None:
    _, _, result = measure_file(tiny.file("fp32"), Photographs(tiny.images))
    detail = next(item.detail for item in result.measures if item.measure == "recall@10")
    assert "2 images and 14 crops of them" in detail
    assert any("no class head, and the images have no labels" in line for line in result.skipped)


def test_the_real_models_saliency_is_measured(exported: Path, saliency_model, monkeypatch: pytest.MonkeyPatch) -> None:
    from fna.export.preprocessing import bundled_photographs

    monkeypatch.setattr("fna.validate.budget.chain.load_model", lambda _name: saliency_model)
    photographs = Photographs(bundled_photographs()[:1])
    chain = open_chain(open_validated_file(exported), None, quietly)
    _, outputs = measure_chain(chain, photographs.images, tolerances={}, on_step=quietly)
    monkeypatch.setattr("fna.validate.task.inputs.FEWEST_FOR_RETRIEVAL", 1)
    result = measure_tasks(chain, EXACT, photographs, outputs, quietly, digits=60)
    exact, fna = outputs.exact["saliency"].ravel(), outputs.exported["saliency"].ravel()
    assert result.find("saliency", "correlation") == pytest.approx(pearsonr(exact, fna).statistic, abs=1e-6)
    assert result.find("saliency", "IoU") == pytest.approx(jaccard_score(exact > 0.5, fna > 0.5))
    assert result.find("digits probe", "accuracy, exact") > 0.5
    assert result.find("digits probe", "agreement") > 0.5


def test_a_classifiers_classes_are_compared_and_scored(tiny) -> None:
    exact, fna = RANDOM.standard_normal((2, 20, 7))
    labels = [f"Kind {number % 7}" for number in range(20)]
    chain = SimpleNamespace(model=load_model("validate_tiny:classifier"))
    vectors = ImageVectors(None, None, exact, fna, 20, "")
    results = Results()
    measure_classification(results, TaskInputs(OutputKinds(), {}, {}, vectors, chain, labels))
    values = {item.measure: item.value for item in results.measures}
    assert values["top-5 agreement"] == top_k_accuracy_score(exact.argmax(axis=1), fna, k=5, labels=range(7))
    assert values["accuracy, FNA"] == accuracy_score([number % 7 for number in range(20)], fna.argmax(axis=1))
    with pytest.raises(InputFileError, match="class folder 'nothing' is no class of the model, which has 7"):
        measure_classification(results, TaskInputs(OutputKinds(), {}, {}, vectors, chain, ["nothing"] * 20))


HEADS = '''
import torch, transformers
from model_families import IMAGE, SIZES, TEXT, randomise

class LinearSegmenter(torch.nn.Module):
    """DINOv2 with a linear layer on its patches: the usual way to segment with it."""

    def __init__(self):
        super().__init__()
        sizes = {**SIZES, **IMAGE, "initializer_range": 0.2, "layerscale_value": 0.5}
        self.backbone = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
        self.head = torch.nn.Linear(32, 5)

    def forward(self, pixel_values):
        patches = self.backbone(pixel_values).last_hidden_state[:, 1:]
        classes = self.head(patches).transpose(1, 2).reshape(-1, 5, 8, 8)
        return {"logits": torch.nn.functional.interpolate(classes, scale_factor=4, mode="bilinear")}

def segmenter():
    torch.manual_seed(0)
    return LinearSegmenter()

def llava():
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(**SIZES, **IMAGE, projection_dim=16)
    text = transformers.LlamaConfig(**TEXT)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98, vision_feature_layer=-1)
    model = transformers.LlavaForConditionalGeneration(config)
    randomise(model)
    return model
'''


@pytest.fixture
def measured(request: pytest.FixtureRequest, tmp_path: Path, tiny, monkeypatch: pytest.MonkeyPatch):
    """A model of `HEADS`, traced with FNA in two blocks at 32 pixels, and what the tasks measure on it."""
    (tmp_path / "heads.py").write_text(HEADS)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load_model(f"heads:{request.param}")
    path = tmp_path / "model.onnx"
    export_onnx(model, uniform_plan(model.num_blocks, layers="1-2", landmarks=6), TraceOptions(32, 32), path)
    return measure_file(path, Photographs(tiny.images), digits=80)


@pytest.mark.parametrize("measured", ["segmenter"], indirect=True)
def test_class_maps_are_compared_pixel_by_pixel(measured) -> None:
    chain, outputs, result = measured
    assert outputs.exact["logits"].shape == (2, 5, 32, 32)
    exact, fna = (arrays["logits"].argmax(axis=1).ravel() for arrays in (outputs.exact, outputs.exported))
    assert result.find("segmentation", "pixel agreement") == pytest.approx(accuracy_score(exact, fna))
    wanted = jaccard_score(exact, fna, average="macro", labels=np.unique(exact))
    assert result.find("segmentation", "mIoU") == pytest.approx(wanted)
    assert 0.5 < result.find("segmentation", "mIoU") < 1
    assert chain.metadata.map_outputs == ()  # five channels are classes, and no map of saliency
    assert result.find("classification", "top-1 agreement") is None


@pytest.mark.parametrize("measured", ["llava"], indirect=True)
def test_the_tokens_that_a_language_model_is_given_are_compared(measured) -> None:
    chain, outputs, result = measured
    exact, fna = (torch.from_numpy(arrays["image_features"]) for arrays in (outputs.exact, outputs.exported))
    cosines = torch.nn.functional.cosine_similarity(exact, fna, dim=-1)
    assert cosines.shape == (2, 64)  # without the class token
    for measure, value in (("mean", cosines.mean()), ("min", cosines.min())):
        assert result.find("projected tokens", f"cosine, {measure}") == pytest.approx(float(value), abs=1e-5)
    wanted = float(cosines.flatten().quantile(0.05))
    assert result.find("projected tokens", "cosine, 5th percentile") == pytest.approx(wanted, abs=1e-5)
    # a first token that is a patch is not taken for the class token
    validation, _ = measure_chain(chain, [("a", Image.new("RGB", (40, 40), "red"))], tolerances={}, on_step=quietly)
    errors = {error.output: error for error in validation.steps[0].errors}
    assert errors["image_features"].cosine_first_token is None
    assert errors["last_hidden_state"].cosine_first_token is not None
    found = {name: prefix_of(chain.metadata, 32, 32, array) for name, array in outputs.exact.items() if array.ndim == 3}
    assert found == {"image_features": 0, "last_hidden_state": 1}


def test_labels_need_two_classes_of_two_images(tiny, class_folders: Path) -> None:
    (class_folders / "0" / "0.png").unlink()
    for name in ("1.png", "2.png"):
        (class_folders / "0" / name).unlink()
    with pytest.raises(InputFileError, match="class folder 0 has one image, but two are needed"):
        measure_file(tiny.file("fp32"), load_labelled(class_folders))


def test_unreadable_images_are_skipped_by_name_and_none_left_is_an_error(class_folders: Path) -> None:
    (class_folders / "1" / "broken.png").write_bytes(b"no image")
    found = load_labelled(class_folders)
    assert len(found.images) == 12
    assert found.labels == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    assert found.skipped[0].startswith("1/broken.png: ")
    for path in class_folders.glob("*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(InputFileError, match="no readable image in .* .13 could not be read, first: 0/0.png"):
        load_labelled(class_folders)


def test_images_beside_class_folders_are_refused(class_folders: Path) -> None:
    (class_folders / "0" / "0.png").rename(class_folders / "stray.png")
    with pytest.raises(InputFileError, match="labels need every image in a class folder"):
        load_labelled(class_folders)


def test_a_further_task_is_one_function_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_sizes(results: Results, inputs: TaskInputs) -> None:
        results.add("sizes", "values kept", float(inputs.approximated["x"].size == inputs.exact["x"].size), "toy")

    monkeypatch.setitem(TASKS, "sizes", measure_sizes)
    arrays = {"x": RANDOM.standard_normal((2, 4))}
    assert compare_outputs(OutputKinds(), arrays, arrays, ["sizes"]).find("sizes", "values kept") == 1
    assert compare_outputs(OutputKinds(), arrays, arrays).find("sizes", "values kept") == 1
    assert compare_outputs(OutputKinds(), arrays, arrays, ["retrieval"]).find("sizes", "values kept") is None
