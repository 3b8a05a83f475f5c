"""A training platform's jobs for masks and keypoints: data from S3, a training, a prediction and an export of it."""

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("moto", reason="moto, the S3 server of the tests, is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

from platform_job import CONFIG, DATASETS, Platform  # noqa: E402
from pycocotools import mask as coco_mask  # noqa: E402

from neo_nb.base.semantic_maps import read_map  # noqa: E402
from neo_nb.data.dice import write_nested_dice  # noqa: E402
from neo_nb.synthetic.crowds import make_scenes  # noqa: E402

TASKS = {  # Task → model, and the kind of annotations
    "instance_segmentation": ("rtdetr-nano-seg", "segmentation"),
    "pose": ("rtdetr-nano-pose", "pose"),
    "semantic_segmentation": ("segformer-nano", "segmentation"),
}


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    made = Platform(tmp_path_factory.mktemp("platform"))
    folder = made.folder / "people"
    table = make_scenes(6, (96, 160), 5, folder, extras=True)
    names = np.array([Path(file).name for file in table.file_names])
    for kind in ("segmentation", "pose"):  # a data set has one of the two
        more = {"keypoints": None, "skeleton": None} if kind == "segmentation" else {"masks": None}
        some = replace(table, file_names=names, semantic_files=None, semantic_names=(), **more)
        splits = {"train": some.select(np.arange(4)), "val": some.select(np.arange(4, 6))}
        write_nested_dice(splits, folder / f"annotations_{kind}.json")
        key = f"datasets/{kind}/annotations_{kind}.json"
        made.s3.put_object(Bucket=DATASETS, Key=key, Body=(folder / f"annotations_{kind}.json").read_bytes())
        for path in (folder / "images").iterdir():
            if path.name in names:
                made.s3.put_object(Bucket=DATASETS, Key=f"datasets/{kind}/images/{path.name}", Body=path.read_bytes())
    yield made
    made.close()


@pytest.mark.parametrize("task", TASKS)
def test_a_job_of_each_task_trains_predicts_and_exports(platform, task):
    model, kind = TASKS[task]
    number = 40 + list(TASKS).index(task)
    config = CONFIG | {"epochs": 1, "imgsz": [96, 160]}
    config["advanced_config"] = CONFIG["advanced_config"] | {"passes_per_epoch": 8}
    known = {"TASK_TYPE": task, "MODEL_NAME": model, "DATASET_ID": kind}
    log = platform.folder / f"{task}.log"
    order = platform.environment(number, CONFIG=json.dumps(config), **known)
    assert platform.start("train", order, log).wait(300) == 0, log.read_text()[-3000:]
    heard = [body for _, body in platform.backend.heard if body.get("job_id") == number]
    judged = next(body for body in heard if body.get("type") == "validation")
    wanted = {"mIoU", "pixel_accuracy"} if task == "semantic_segmentation" else {"AP", "box_AP"}
    assert judged["task_type"] == task and wanted <= set(judged["metrics"])
    assert {f"checkpoints/{number}/{name}.pt" for name in ("best", "last")} <= set(platform.keys())

    basic = {} if task == "semantic_segmentation" else {"conf": 0.0}
    images = {"IMAGES_S3_URI": f"s3://{DATASETS}/datasets/{kind}/images/", "CONFIG": json.dumps(basic)}
    images |= {"CHECKPOINT_S3_URI": f"s3://training-checkpoints/checkpoints/{number}/best.pt"}
    predict = platform.environment(number + 10, **(known | images))
    assert platform.start("predict", predict, log).wait(300) == 0, log.read_text()[-3000:]
    told = json.loads(platform.read(f"inference-results/{number + 10}/predictions.json"))
    if task == "semantic_segmentation":
        assert told["class_names"] == ["background", "person", "head"]
        path = platform.folder / "map.png"
        path.write_bytes(platform.read(f"inference-results/{number + 10}/{told['results'][0]['segmentation_map']}"))
        assert read_map(path, (96, 160), 3).shape == (96, 160)
    elif kind == "segmentation":
        assert coco_mask.decode(told["results"][0]["predictions"][0]["segmentation"]).shape == (96, 160)
    else:
        assert np.array(told["results"][0]["predictions"][0]["keypoints"]).shape == (17, 3)
    known |= {"EXPORT_FORMAT": "onnx", "TRAINING_JOB_ID": str(number)}
    known |= {"CONFIG": json.dumps({"advanced_config": {"min_score": 0.0001}})}  # of maps: told that it means nothing
    known |= {"CHECKPOINT_S3_URI": images["CHECKPOINT_S3_URI"]}
    export = platform.environment(number + 20, **known)
    assert platform.start("export", export, log).wait(300) == 0, log.read_text()[-3000:]
    [key] = platform.keys(f"exports/{number}/")
    with zipfile.ZipFile(io.BytesIO(platform.read(key))) as archive:
        about, runtime = json.loads(archive.read("metadata.json")), archive.read("runtime.py").decode()
    assert about["task_type"] == task and about["framework"] == "neo_nb" and "neo_nb" not in runtime
    assert ("class Segmenter" in runtime) == (task == "semantic_segmentation")
