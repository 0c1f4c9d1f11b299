"""SPICE itself (Anderson et al. 2016), by its authors' Java program, kept running.

The jar's own command starts a Java machine per call, and on Java 15 and later cannot write its result. Here one Java
process loads the jar and its parser once and scores batches of pairs; `SpiceServer.java` is what it runs.

What it needs is not installed with fastcorl:

- a JDK, Java 8 or later, for `java` and `javac`;
- `pip install pycocoevalcap`, which brings `spice-1.0.jar` and most of its libraries. They are under the GNU AGPL 3;
- Stanford CoreNLP 3.6.0, by hand: `stanford-corenlp-3.6.0.jar` and `stanford-corenlp-3.6.0-models.jar` of
  https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip, in the folder `lib` beside the jar.

Tested for its protocol against a stand-in, and for what it does with tuples against the jar's own classes; the parser
inside it could not be run where this was written, since the models could not be had there.
"""

import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fastcorl.errors import UserError
from fastcorl.rewards.captions.json_process import JsonProcess

JAR = "spice-1.0.jar"
CORENLP = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
CORENLP_ARCHIVE = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
SERVER = Path(__file__).with_name("SpiceServer.java")


class Spice:
    """F1 of the tuples of two captions' scene graphs, synonyms by WordNet; NaN for a reference without tuples.

    A Java process of about 4 GiB per object, started by the first call, which takes some ten seconds more.
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        threads: int = 1,
        memory: str = "8G",
        timeout: float = 600.0,
        start_timeout: float = 600.0,
        command: Sequence[str] | None = None,
    ) -> None:
        """Args:
        folder: Where spice-1.0.jar and its `lib` are; None is the installed package pycocoevalcap's.
        threads: With how many the parser runs.
        memory: The most that Java may take for its heap, as for -Xmx.
        timeout: Seconds that a batch may take.
        start_timeout: Seconds until the parser's models must be loaded.
        command: Another program that speaks SpiceServer's protocol, instead of Java.

        Raises:
            UserError: Java, the jar or CoreNLP is missing; here, so that no training is begun without them.
        """
        self._classes: tempfile.TemporaryDirectory | None = None
        if command is None:
            java, compiler, jars = find_java(), find_java("javac"), find_jars(folder)

            def start() -> list[str]:
                if self._classes is None:
                    self._classes = compile_server(compiler, jars)
                path = os.pathsep.join([self._classes.name, *map(str, jars)])
                return [java, f"-Xmx{memory}", "-cp", path, "SpiceServer", str(threads)]
        else:

            def start() -> list[str]:
                return list(command)

        self._process = JsonProcess("spice", start, start_timeout=start_timeout, timeout=timeout)

    def __call__(self, references: list[str], candidates: list[str]) -> list[float]:
        """SPICE of each pair, in [0, 1].

        Raises:
            UserError: Java does not start with the jar.
            RuntimeError: A batch failed twice: Java ended or took too long.
        """
        pairs = list(zip(references, candidates, strict=True))
        distinct = list(dict.fromkeys(pairs))
        if not distinct:
            return []
        scores = self._process.request({"pairs": distinct}).get("scores")
        if not isinstance(scores, list) or len(scores) != len(distinct):
            raise UserError(f"spice: {len(distinct)} scores were asked for, the reply has {scores!r}"[:300])
        score_of = {
            pair: math.nan if score is None else float(score) for pair, score in zip(distinct, scores, strict=True)
        }
        return [score_of[pair] for pair in pairs]

    def close(self) -> None:
        """End the Java process; a later call starts another."""
        self._process.close()


def find_java(program: str = "java") -> str:
    """The path of `java` or `javac`: of JAVA_HOME if that is set, else of PATH."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which(program, path=str(Path(home, "bin"))) if home else shutil.which(program)
    if found is None:
        where = f"JAVA_HOME ({home})" if home else "PATH"
        raise UserError(f"rewards.caption_similarity spice: no {program} in {where}; install a JDK, or take spice_py")
    return found


def find_jars(folder: str | Path | None = None) -> list[Path]:
    """spice-1.0.jar and the libraries beside it, checked for what SPICE cannot do without."""
    if folder is None:
        package = find_spec("pycocoevalcap")
        places = list(package.submodule_search_locations or ()) if package is not None else []
        if not places:
            raise UserError(
                "rewards.caption_similarity spice: the package pycocoevalcap is missing; pip install pycocoevalcap, or "
                f"name the folder of {JAR} in rewards.spice_folder"
            )
        folder = Path(places[0], "spice")
    jar, libraries = Path(folder, JAR), Path(folder, "lib")
    if not jar.is_file():
        raise UserError(f"rewards.spice_folder: {folder} has no {JAR}; pip install pycocoevalcap brings it")
    missing = [name for name in CORENLP if not (libraries / name).is_file()]
    if missing:
        raise UserError(
            f"rewards.caption_similarity spice: {libraries} lacks {' and '.join(missing)}; take them from "
            f"{CORENLP_ARCHIVE}, or take spice_py"
        )
    return [jar, *sorted(libraries.glob("*.jar"))]


def compile_server(compiler: str, jars: Sequence[Path]) -> tempfile.TemporaryDirectory:
    """SpiceServer's classes in a temporary folder."""
    classes = tempfile.TemporaryDirectory(prefix="fastcorl-spice-")
    path = os.pathsep.join(map(str, jars))
    result = subprocess.run(
        [compiler, "-nowarn", "-encoding", "UTF-8", "-cp", path, "-d", classes.name, str(SERVER)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if result.returncode:
        said = " | ".join(result.stderr.split("\n"))[:500]
        raise UserError(
            f"rewards.caption_similarity spice: {JAR} is not as expected, {SERVER.name} fails to compile: {said}"
        )
    return classes
