"""A training platform's backend: every body is read by a model that knows its documented fields and no others."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metrics(Strict):
    loss: float | None
    accuracy: float | None
    learning_rate: float | None
    extra_metrics: dict[str, float | None]


class Progress(Strict):
    job_id: int
    status: Literal["running"]
    current_epoch: int = Field(ge=0)
    total_epochs: int = Field(gt=0)
    progress_percent: float = Field(ge=0, le=100)
    metrics: Metrics | None
    checkpoint_path: str | None
    best_checkpoint_path: str | None = None
    epoch_duration_seconds: float | None = None
    estimated_time_remaining: float | None = None
    logs: str | None = None
    error_message: str | None = None
    traceback: str | None = None


class Validation(Strict):
    type: Literal["validation"]
    job_id: int
    epoch: int = Field(ge=1)
    task_type: str
    primary_metric_name: str
    primary_metric_value: float | None
    metrics: dict[str, float | None]
    is_best: bool
    timestamp: str
    class_names: list[str] | None = None
    visualization_urls: list[str] | None = None
    per_class_metrics: dict[str, Any] | None = None
    overall_loss: float | None = None
    confusion_matrix: Any = None
    pr_curves: Any = None
    image_results: Any = None


class Completed(Strict):
    job_id: int
    status: Literal["completed"]
    total_epochs_completed: int = Field(ge=0)
    final_metrics: Metrics
    exit_code: Literal[0]
    best_checkpoint_path: str | None
    last_checkpoint_path: str | None
    best_metrics: Metrics | None = None
    best_epoch: int | None = None
    model_artifacts_path: str | None = None
    total_duration_seconds: float | None = None


class Failed(Strict):
    job_id: int
    status: Literal["failed"]
    total_epochs_completed: int = Field(ge=0)
    error_message: str = Field(
        pattern=r"(?s)^\[(Dataset|Checkpoint|Config|Resource|Network|Framework|Validation|Unknown)\] .+"
    )
    exit_code: Literal[1]
    traceback: str


class Log(Strict):
    job_id: int
    event_type: str
    message: str
    level: Literal["debug", "info", "warning", "error"]
    data: dict[str, Any]
    timestamp: str


class UploadAddress(Strict):
    checkpoint_filename: str
    content_type: str


class Started(Strict):
    type: Literal["inference", "export"]
    job_id: int
    status: Literal["running"]
    timestamp: str


class Found(Strict):
    class_id: int
    class_name: str
    confidence: float = Field(ge=0, le=1)
    bbox: list[float] = Field(min_length=4, max_length=4)
    segmentation: dict | None = None  # of tasks that the protocol says nothing more about: COCO's run lengths
    keypoints: list[tuple[float, float, float]] | None = None


class Inferred(Strict):
    image_path: str
    image_name: str
    predictions: list[Found]
    segmentation_map: str | None = None
    inference_time_ms: float = Field(ge=0)


class Inference(Strict):
    type: Literal["inference"]
    job_id: int
    status: Literal["completed"]
    total_images: int
    total_inference_time_ms: float
    avg_inference_time_ms: float
    results: list[Inferred]
    result_urls: list[str]
    timestamp: str


class Export(Strict):
    type: Literal["export"]
    job_id: int
    status: Literal["completed"]
    export_format: str
    output_s3_uri: str
    file_size_bytes: int = Field(gt=0)
    metadata: dict[str, Any]
    timestamp: str


class Heartbeat(Strict):
    trace_id: str
    epoch: int
    total_epochs: int = Field(gt=0)
    step: int
    total_steps: int = Field(gt=0)
    progress: float = Field(ge=0, le=1)
    metrics: dict[str, float | None]


class Event(Strict):
    level: Literal["debug", "info", "warning", "error"]
    event_type: Literal["checkpoint_saved", "validation_complete", "dataset_loaded", "model_initialized", "error"]
    message: str
    data: dict[str, Any]


class Artifacts(Strict):
    best_checkpoint: str | None
    last_checkpoint: str | None


class Done(Strict):
    status: Literal["succeeded", "failed"]
    error: str | None
    final_metrics: dict[str, Any]
    artifacts: Artifacts
    training_time_seconds: float


MODELS: dict[str, tuple[type[Strict], ...]] = {
    "/training/jobs/{}/callback/progress": (Progress,),
    "/training/jobs/{}/callback/completion": (Completed, Failed),
    "/training/jobs/{}/callback/logs": (Log,),
    "/training/jobs/{}/checkpoints/upload-url": (UploadAddress,),
    "/validation/jobs/{}/results": (Validation,),
    "/test_inference/inference/jobs/{}/callback/started": (Started,),
    "/test_inference/inference/jobs/{}/callback/completion": (Inference, Failed),
    "/export/jobs/{}/callback/started": (Started,),
    "/export/jobs/{}/callback/completion": (Export, Failed),
    "/v1/jobs/{}/heartbeat": (Heartbeat,),
    "/v1/jobs/{}/event": (Event,),
    "/v1/jobs/{}/done": (Done,),
}


@dataclass
class Backend:
    """What it heard, and how it behaves: `behave` may answer a request in place of the backend."""

    heard: list[tuple[str, dict]] = field(default_factory=list)  # Last word of the path, body; what was accepted
    wrong: list[str] = field(default_factory=list)  # What no model takes
    tried: list[str] = field(default_factory=list)  # Every path that was posted to
    headers: list[dict] = field(default_factory=list)
    should_continue: bool = True
    behave: Callable[[str, dict], Any] = lambda path, body: None
    upload_url: Callable[[str], str] = lambda name: ""
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def named(self, *names: str) -> list[dict]:
        return [body for name, body in self.heard if name in names]

    def reset(self) -> None:
        self.heard.clear(), self.wrong.clear(), self.tried.clear(), self.headers.clear()
        self.should_continue, self.behave = True, lambda path, body: None

    def accept(self, path: str, body: dict) -> Any:
        parts = path.removeprefix("/api/v1").split("/")
        place = next((i for i, part in enumerate(parts) if part == "jobs"), 0) + 1
        models = MODELS.get("/".join([*parts[:place], "{}", *parts[place + 1 :]]))
        if models is None:
            self.wrong.append(f"no such path: {path}")
            return JSONResponse({"success": False, "message": "no such path"}, 404)
        faults = []
        for model in models:
            try:
                model.model_validate_json(json.dumps(body))
                break
            except ValidationError as error:
                faults.append(str(error))
        else:
            self.wrong.append(f"{path}: {faults}")
            return JSONResponse({"success": False, "message": "not valid"}, 422)
        self.heard.append((parts[-1], body))
        if parts[-1] == "heartbeat":
            return {"status": "ok", "should_continue": self.should_continue}
        if parts[-1] == "upload-url":
            name = body["checkpoint_filename"]
            return {"upload_url": self.upload_url(name), "object_key": f"checkpoints/{name}", "expires_in": 3600}
        return {"success": True, "message": "", "job_status": body.get("status", "running")}


def make_app(backend: Backend) -> FastAPI:
    app = FastAPI()

    @app.post("/{path:path}")
    async def post(path: str, request: Request) -> Any:
        import asyncio

        body = json.loads(await request.body())
        backend.tried.append(f"/{path}")
        backend.headers.append(dict(request.headers))
        answer = backend.behave(f"/{path}", body)
        if answer == "time out":
            await asyncio.sleep(3600)
        if isinstance(answer, int):
            return JSONResponse({"detail": "as it was told"}, answer)
        if isinstance(answer, str):  # it had the message, and answers something else than JSON
            backend.accept(f"/{path}", body)
            return PlainTextResponse(answer)
        return backend.accept(f"/{path}", body)

    return app


class Running:
    """The backend on uvicorn, in a thread; it can be stopped and started again on its port."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.start()

    def start(self) -> None:
        config = uvicorn.Config(
            make_app(self.backend),
            host="127.0.0.1",
            port=self.backend.port,
            log_level="error",
            timeout_graceful_shutdown=1,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.backend.port = self.server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
