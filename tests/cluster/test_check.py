from pathlib import Path

import pytest

from cluster.check import check_cluster_file

ROOT = Path(__file__).resolve().parents[2]
OURS = ROOT / "ray_cluster.yaml"


def changed(tmp_path: Path, old: str, new: str) -> list[str]:
    """Problems of our cluster file after replacing some text that must be there."""
    text = OURS.read_text()
    assert old in text
    path = tmp_path / "cluster.yaml"
    path.write_text(text.replace(old, new))
    return check_cluster_file(path)


def test_our_cluster_file_is_fine() -> None:
    assert check_cluster_file(OURS) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("\nmax_workers:", "\nmax_worker:", "max_worker"),
        ("head_node_type: head", "head_node_type: haed", "head_node_type"),
        ("    min_workers: 0", "    min_worker: 0", "min_worker"),
        ("{CPU: 4, GPU: 1}", "{CPU: 4, GPU: 1.5}", "1.5"),
        ("InstanceType: g5", "InstanceTyp: g5", "InstanceTyp"),
        ("{MarketType: spot}", "{MarketTyp: spot}", "MarketTyp"),
        ("VolumeSize: 200", "VolumeSize: big", "VolumeSize"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    problems = changed(tmp_path, old, new)
    assert problems
    assert named in " ".join(problems)


def test_keys_in_the_file_are_found(tmp_path: Path) -> None:
    problems = changed(tmp_path, "  - ray stop\n", "  - export AWS_SECRET_ACCESS_KEY=abc\n  - ray stop\n")
    assert len(problems) == 2
    assert all("secret" in problem for problem in problems)


def test_the_head_takes_no_work_and_the_workers_are_spot() -> None:
    import yaml

    config = yaml.safe_load(OURS.read_text())
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert {kind["node_config"]["InstanceMarketOptions"]["MarketType"] for kind in types.values()} == {"spot"}
    assert {kind["min_workers"] for kind in types.values()} == {0}


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(content)
    assert len(check_cluster_file(path)) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml" in check_cluster_file(tmp_path / "nowhere.yaml")[0]
