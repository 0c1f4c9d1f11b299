"""`fastcorl push`."""

import json
import sys
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Annotated

import tyro

from fastcorl.errors import UserError
from fastcorl.places import check_janus
from fastcorl.runtime.card_parts import CARD

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
FILES = (
    CARD,
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    *WEIGHTS,
    *ADAPTER,
)  # what an export consists of


@dataclass
class Push:
    """Upload an exported model with its card to the Hugging Face hub; other files of its folder stay here."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of an export, as runs/quickstart/export/merge, or of a run, as runs/quickstart, with --stage."""
    repository: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OWNER/NAME")]
    """Repository of the hub, created if it is missing; its card and weights are replaced."""
    stage: str | None = None
    """Stage to push where FOLDER is a run; not needed where the run has one."""
    private: bool = False
    """Make the repository a private one."""
    revision: str | None = None
    """Branch to push to, made if it is not there; None is the main one."""
    message: str | None = None
    """Message of the commit."""

    def run(self) -> None:
        folder = self._export()
        files = _own_files(folder)

        from huggingface_hub import get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise UserError(f"push: {self.repository!r} cannot be a name of the hub: {error}") from error
        if "/" not in self.repository:
            raise UserError(f"push: {self.repository!r} must be owner/name: your account or organisation, and a name")
        if get_token() is None:
            raise UserError("push: there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN")
        place = self._upload(folder, files)
        left = sorted(path.name for path in folder.iterdir() if path.name not in files and path.name != "adapter")
        if left:
            print(f"not uploaded, as no part of an export: {', '.join(left)}", file=sys.stderr)
        size = sum((folder / name).stat().st_size for name in files) / 1e6
        print(f"{place}: {len(files)} files, {size:,.1f} MB")

    def _upload(self, folder: Path, files: list[str]) -> str:
        """Where they are now."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        from fastcorl import __version__

        watched = sys.stderr.isatty()
        if not watched:
            disable_progress_bars()
        api = HfApi(library_name="fastcorl", library_version=__version__)
        try:
            api.create_repo(self.repository, private=self.private or None, exist_ok=True)
            public = self.private and not api.model_info(self.repository).private
            if not public:
                if self.revision is not None and not self.revision.startswith("refs/"):
                    api.create_branch(self.repository, branch=self.revision, exist_ok=True)
                api.upload_folder(
                    repo_id=self.repository,
                    folder_path=folder,
                    allow_patterns=[escape(name) for name in files],
                    delete_patterns=[*WEIGHTS, *ADAPTER],  # of another model, or cut into other files
                    revision=self.revision,
                    commit_message=self.message or f"{folder.resolve().name}, by fastcorl {__version__}",
                )
        except Exception as error:  # the hub client's, its HTTP library's and hf_xet's have no common base
            if watched:
                print(file=sys.stderr)  # a bar may have been left on the line
            raise UserError(f"push: {self._reason(error, api.endpoint)}") from error
        if public:
            raise UserError(f"push: {self.repository} is there and public; make it private there, or omit --private")
        return f"{api.endpoint}/{self.repository}" + (f"/tree/{self.revision}" if self.revision else "")

    def _export(self) -> Path:
        """The folder to push."""
        folder, stage = self.folder, self.stage
        if not folder.is_dir():
            raise UserError(f"push: {folder}: there is no such folder; give an export, as runs/quickstart/export/merge")
        exports = folder / "export"
        if not exports.is_dir():
            if stage is not None:
                raise UserError(f"push: {folder}: has no folder export, so it is no run; omit --stage, or give a run")
            return folder
        stages = sorted(path.name for path in exports.iterdir() if (path / "config.json").is_file())
        finished = [name for name in stages if not name.startswith(("tmp-", "abandoned-"))]
        if not finished:
            raise UserError(f"push: {folder}: no stage of this run is finished")
        if stage is None and len(finished) > 1:
            raise UserError(f"push: {folder}: name a stage, as in --stage {finished[-1]} (of {', '.join(finished)})")
        if stage is not None and stage not in finished:
            raise UserError(f"push: --stage {stage}: is none of this run's finished ones ({', '.join(finished)})")
        return exports / (stage or finished[0])

    def _reason(self, error: Exception, endpoint: str) -> str:
        """What went wrong, and what helps."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        text = " ".join(str(error).split())
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set; unset it to push"
        if isinstance(error, json.JSONDecodeError):
            return f"{endpoint} does not answer as the hub does; is HF_ENDPOINT right?"
        if isinstance(error, ValueError):  # such as front matter that the hub refuses
            return text
        if answer is None:
            told = "cannot be reached" if any(isinstance(cause, HTTPError | OSError) for cause in causes) else "failed"
            return f"{endpoint} {told}: {text}; try again, what is there already is not sent twice"
        status, said = answer.response.status_code, answer.server_message or text
        remedies = {
            401: "the token is not accepted; log in again with `hf auth login`, or put a valid one in HF_TOKEN",
            403: f"the token may not write to {self.repository}; name a repository of yours, or use a token that may",
            404: f"there is no such place; check the name {self.repository}"
            + (f" and --revision {self.revision}" if self.revision else "")
            + ", and that the token may see it",
        }
        return f"{remedies.get(status, 'the hub refused; try again later')} ({status}: {said})"


def _own_files(folder: Path) -> list[str]:
    """Paths in `folder` of what belongs to the model there; UserError where that is not whole."""
    check_janus(str(folder), "push")
    files = [path.relative_to(folder).as_posix() for name in FILES for path in sorted(folder.glob(name))]
    if not any(name.endswith(".safetensors") and "/" not in name for name in files):
        raise UserError(f"push: {folder}: has no *.safetensors; write some with fastcorl export --from {folder}")
    if CARD not in files:
        raise UserError(f"push: {folder}: has no model card, {CARD}; write one, fastcorl export does for its copies")
    return files
