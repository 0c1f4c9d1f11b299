import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastcorl.errors import UserError
from fastcorl.rewards.captions.spice import CORENLP, JAR, SERVER, Spice, compile_server, find_jars, find_java

STAND_IN = Path(__file__).with_name("spice_stand_in.py")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def make_spice(log):
    """Spice with a stand-in for Java; it writes to `log` each start and each batch's size."""
    made = []

    def make(mode="", timeout=20.0, start_timeout=20.0):
        command = [sys.executable, str(STAND_IN), str(log), mode]
        made.append(Spice(command=command, timeout=timeout, start_timeout=start_timeout))
        return made[-1]

    yield make
    for spice in made:
        spice.close()


def test_scores_in_order_and_each_distinct_pair_once(make_spice, log):
    spice = make_spice()
    assert spice.range == (0.0, 1.0)
    scores = spice(["a b", "a", "", "a b", "ü 猫"], ["b", "a", "a", "b", "猫 ü"])
    assert scores[:2] == [0.5, 1.0] and math.isnan(scores[2]) and scores[3:] == [0.5, 1.0]
    assert log.read_text().splitlines() == ["start", "batch 4"]


def test_one_process_for_all_batches(make_spice, log):
    spice = make_spice()
    for _ in range(3):
        assert spice(["a"], ["a"]) == [1.0]
    assert log.read_text().splitlines() == ["start", *["batch 1"] * 3]


def test_nothing_is_started_for_nothing(make_spice, log):
    assert make_spice()([], []) == []
    assert not log.exists()


def test_a_batch_larger_than_a_pipe(make_spice):
    words = [f"{'w' * 200}{index}" for index in range(3000)]  # 1.2 MB
    assert make_spice()(words, words) == [1.0] * 3000


def test_as_many_candidates_as_references(make_spice):
    with pytest.raises(ValueError, match="shorter"):
        make_spice()(["a", "b"], ["a"])


def test_a_process_that_died_between_batches_is_started_again(make_spice, log):
    spice = make_spice()
    assert spice(["a"], ["a"]) == [1.0]
    process = spice._process._running.process
    process.kill()
    process.wait()
    assert spice(["a"], ["a"]) == [1.0]
    assert log.read_text().count("start") == 2


@pytest.mark.parametrize("caption", ["die once", "hang once"])
def test_a_failed_batch_is_tried_again_in_a_fresh_process(make_spice, log, caption):
    spice = make_spice(timeout=1.0)
    assert spice([caption], [caption]) == [1.0]
    assert log.read_text().splitlines() == ["start", "batch 1", "start", "batch 1"]


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("die", "spice: ended with code 1: .*Java heap space"),
        ("hang", "spice: gave no answer within 1 s: loading models"),
        ("babble", "spice: wrote what is no reply: 'WARNING: something'"),
        ("refuse", "spice: java.lang.NullPointerException"),
        ("short", "spice: 1 scores were asked for, the reply has"),
    ],
)
def test_a_batch_that_fails_twice_is_an_error_and_not_a_score(make_spice, caption, message):
    spice = make_spice(timeout=1.0)
    began = time.monotonic()
    with pytest.raises(UserError, match=message):
        spice([caption], ["a"])
    assert time.monotonic() - began < 10
    assert spice(["a"], ["a"]) == [1.0]  # and the next batch has a process again


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("no start", "spice: could not be started: ended with code 1: Could not load the parser . out of memory"),
        ("slow start", "spice: could not be started: gave no answer within 1 s"),
    ],
)
def test_a_program_that_does_not_start(make_spice, mode, message):
    with pytest.raises(UserError, match=message) as raised:
        make_spice(mode, start_timeout=1.0 if mode == "slow start" else 20.0)(["a"], ["a"])
    assert "\n" not in str(raised.value)


def test_a_program_that_is_not_there():
    with pytest.raises(UserError, match="cannot run /no/such/java: No such file"):
        Spice(command=["/no/such/java"])(["a"], ["a"])


def test_closing_ends_the_process_and_a_call_starts_another(make_spice, log):
    spice = make_spice()
    spice(["a"], ["a"])
    process = spice._process._running.process
    spice.close()
    assert process.poll() is not None
    assert spice(["a"], ["a"]) == [1.0]
    assert log.read_text().count("start") == 2


@pytest.mark.parametrize("ending", ["", "; raise SystemExit(3)"])
def test_the_process_ends_with_python(log, ending):
    code = (
        "import sys; from fastcorl.rewards.captions.spice import Spice; "
        f"spice = Spice(command=[sys.executable, {str(STAND_IN)!r}, {str(log)!r}]); spice(['a'], ['a']); "
        f"print(spice._process._running.process.pid){ending}"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == (3 if "Exit" in ending else 0), done.stderr
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def _installed(folder, *, corenlp=CORENLP):
    (folder / "lib").mkdir()
    (folder / JAR).touch()
    for name in corenlp:
        (folder / "lib" / name).touch()
    return folder


def test_jars_of_a_folder(tmp_path):
    jars = find_jars(_installed(tmp_path))
    assert [jar.name for jar in jars] == [JAR, *sorted(CORENLP)]


@pytest.mark.parametrize("present", [CORENLP[:1], CORENLP[1:], ()])
def test_without_corenlp(tmp_path, present):
    with pytest.raises(
        UserError, match="lib lacks stanford-corenlp.*take them from https://nlp.stanford.edu/"
    ) as raised:
        find_jars(_installed(tmp_path, corenlp=present))
    assert [name in str(raised.value) for name in CORENLP] == [name not in present for name in CORENLP]


def test_without_the_jar(tmp_path):
    with pytest.raises(UserError, match=f"rewards.spice_folder: .* has no {JAR}; pip install pycocoevalcap"):
        find_jars(tmp_path)


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("fastcorl.rewards.captions.spice.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install pycocoevalcap, or name the folder of .* in rewards.spice_folder"):
        find_jars()


def test_the_packages_own_folder(tmp_path, monkeypatch):
    (tmp_path / "pycocoevalcap" / "spice").mkdir(parents=True)
    folder = _installed(tmp_path / "pycocoevalcap" / "spice")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_jars()[0] == folder / JAR


@pytest.mark.parametrize("program", ["java", "javac"])
def test_without_java(tmp_path, monkeypatch, program):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"no {program} in PATH; install a JDK"):
        find_java(program)


def test_java_home_comes_first(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert find_java() == str(program)
    with pytest.raises(UserError, match="no javac in JAVA_HOME"):
        find_java("javac")


# What SpiceServer needs of the jar, with the same names and types: captions of "; "-separated words are sets of tuples.
STUBS = {
    "edu/anu/spice/SceneGraph.java": """
        package edu.anu.spice;
        public class SceneGraph { final String text; SceneGraph(String text) { this.text = text; } }""",
    "edu/anu/spice/SpiceParser.java": """
        package edu.anu.spice;
        import java.util.*;
        public class SpiceParser {
          public SpiceParser(String cache, int threads, Boolean merge) {
            if (cache != null || !merge) throw new IllegalArgumentException();
            System.out.println("Loading models"); }
          public List<SceneGraph> parseCaptions(List<String> captions) {
            List<SceneGraph> graphs = new ArrayList<>();
            System.err.println("parse " + captions.size());
            for (String caption : captions) {
              if (caption.equals("fail")) throw new IllegalStateException("bad caption");
              graphs.add(new SceneGraph(caption)); }
            return graphs; } }""",
    "edu/anu/spice/TupleSet.java": """
        package edu.anu.spice;
        import java.util.*;
        public class TupleSet { final Set<String> words = new HashSet<>();
          public TupleSet(SceneGraph graph) {
            words.addAll(Arrays.asList(graph.text.split("; "))); words.remove(""); } }""",
    "edu/anu/spice/Evaluation.java": """
        package edu.anu.spice;
        import java.util.*;
        public class Evaluation { public double f;
          public Evaluation(TupleSet candidate, TupleSet reference, boolean allowNan, boolean useSynsets) {
            Set<String> both = new HashSet<>(candidate.words); both.retainAll(reference.words);
            int size = candidate.words.size() + reference.words.size();
            f = reference.words.isEmpty() && allowNan ? Double.NaN : 2.0 * both.size() / size; } }""",
    "org/json/simple/JSONArray.java": """
        package org.json.simple;
        import java.util.*;
        public class JSONArray extends ArrayList {
          public String toString() { StringJoiner all = new StringJoiner(", ", "[", "]");
            for (Object one : this) all.add(String.valueOf(one)); return all.toString(); } }""",
    "org/json/simple/JSONObject.java": """
        package org.json.simple;
        import java.util.*;
        public class JSONObject extends HashMap {
          public String toJSONString() { StringJoiner all = new StringJoiner(", ", "{", "}");
            for (Object key : keySet()) { Object value = get(key);
              all.add("\\"" + key + "\\": " + (value instanceof String ? "\\"" + value + "\\"" : value)); }
            return all.toString(); } }""",
    "org/json/simple/parser/JSONParser.java": """
        package org.json.simple.parser;
        import java.util.regex.*;
        import org.json.simple.*;
        public class JSONParser { public Object parse(String text) {
          JSONArray pairs = new JSONArray();
          Matcher pair = Pattern.compile("\\\\[\\"([^\\"]*)\\", \\"([^\\"]*)\\"\\\\]").matcher(text);
          while (pair.find()) { JSONArray one = new JSONArray();
            one.add(pair.group(1)); one.add(pair.group(2)); pairs.add(one); }
          JSONObject request = new JSONObject(); request.put("pairs", pairs); return request; } }""",
}


@pytest.mark.skipif(shutil.which("javac") is None, reason="needs a JDK")
def test_the_java_side_on_stubs_of_the_jar(tmp_path):
    for name, text in STUBS.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    stubs = tmp_path / "stubs"
    sources = [str(tmp_path / "source" / name) for name in STUBS]
    subprocess.run(["javac", "-nowarn", "-d", str(stubs), *sources], check=True, capture_output=True)
    classes = compile_server("javac", [stubs])
    path = os.pathsep.join([classes.name, str(stubs)])
    spice = Spice(command=["java", "-cp", path, "SpiceServer", "1"], timeout=30, start_timeout=60)
    scores = spice(["dog; red", "", "dog"], ["dog; blue", "dog", ""])
    assert scores[0] == 0.5 and math.isnan(scores[1]) and scores[2] == 0.0
    assert spice(["dog"], ["dog; red"]) == [pytest.approx(2 / 3)]
    with pytest.raises(UserError, match="spice: java.lang.IllegalStateException: bad caption"):
        spice(["dog"], ["fail"])
    assert spice(["dog"], ["dog"]) == [1.0]  # the same process goes on
    # "a dog" when it starts, four captions, "dog; red" was known, "dog" was; the bad one
    parses = [line.strip() for line in spice._process._running.said if line.startswith("parse")]
    assert parses == ["parse 1", "parse 4", "parse 1"]
    spice.close()


@pytest.mark.skipif(shutil.which("javac") is None, reason="needs a JDK")
def test_a_jar_that_is_another(tmp_path):
    with pytest.raises(UserError, match=f"{SERVER.name} fails to compile: .*error") as raised:
        compile_server("javac", [tmp_path])
    assert "\n" not in str(raised.value)
