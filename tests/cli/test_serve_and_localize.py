"""`taskbone serve`, `localize`, `evaluate`: what they pass on, and how they show the result."""

from pathlib import Path
from typing import Any

import pytest

from model_store.store import Store
from serving.config import ServeConfig
from tests.cli.command_page import as_promised
from tests.cli.running import fail, run, succeed


class TestServe:
    @pytest.fixture
    def served(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
        """The configs that servers were started with, instead of starting them."""
        with store.staging() as folder:
            (folder / "any").write_text("file")
            store.add_backbone("ab" * 32, "other", folder)
        configs: list[ServeConfig] = []

        def serve(config: ServeConfig, *, as_json: bool) -> None:
            assert not as_json
            configs.append(config)

        for module in ("private_ray", "cluster"):
            monkeypatch.setattr(f"serving.{module}.run", serve)
        return configs

    def test_defaults_are_those_of_the_config(
        self, store: Store, served: list[ServeConfig]
    ) -> None:
        succeed("serve")
        assert served == [ServeConfig(store=store.root)]

    def test_every_setting_has_its_option(self, store: Store, served: list[ServeConfig]) -> None:
        changed: dict[str, Any] = {}
        for name, setting in ServeConfig.model_fields.items():
            if name in ("device", "precision", "log_format"):
                others = {"device": "cpu", "precision": "fp32", "log_format": "json"}
                changed[name] = others[name]
            elif isinstance(setting.default, int | float) and not isinstance(setting.default, bool):
                changed[name] = setting.default + 1
            elif name in ("backbone", "host", "ray_address"):
                changed[name] = "other"
            elif name == "otlp_endpoint":
                changed[name] = "http://collector:4318"
            elif name == "cache":
                changed[name] = Path("/elsewhere")
        # As many as there are at the start, at least.
        changed["max_replicas"] = changed["replicas"]
        # Not on a Ray that runs already.
        grpc = {"grpc_port": changed.pop("grpc_port")}
        options = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
        succeed("serve", *options, "--no-auth", "--no-access-log")
        succeed("serve", f"--grpc-port={grpc['grpc_port']}")
        assert served == [
            ServeConfig(store=store.root, auth=False, access_log=False, **changed),
            ServeConfig(store=store.root, **grpc),
        ]
        given = changed.keys() | grpc.keys() | {"store", "auth", "access_log", "signature_key"}
        assert given == ServeConfig.model_fields.keys()

    def test_no_backbone_is_said_before_anything_starts(
        self, served: list[ServeConfig], tmp_path: Path
    ) -> None:
        assert "add-backbone" in fail("serve", "--store", tmp_path / "empty")
        assert "no backbone 'absent'" in fail("serve", "--backbone", "absent")
        assert served == []

    def test_a_wrong_setting_is_named(self, store: Store, served: list[ServeConfig]) -> None:
        assert "replicas" in fail("serve", "--replicas", "0")
        assert served == []


class TestLocalization:
    def test_localize_passes_its_options_on(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[tuple[Path, dict[str, Any]]] = []
        monkeypatch.setattr(
            "localization.runs.localize_file",
            lambda file, *, console, **options: calls.append((file, options)),
        )
        succeed("localize", "task.yaml")
        folders = [f"--data={tmp_path}", f"--work-dir={tmp_path}", f"--output={tmp_path / 'a'}"]
        succeed("localize", "task.yaml", *folders, "--no-publish", "--device", "cpu")
        (_, plain), (file, full) = calls
        assert file == Path("task.yaml")
        assert plain.pop("store").root == full.pop("store").root == store.root
        assert plain == {
            **dict.fromkeys(("data", "work_dir", "output")),
            **{"publish": True, "device": "auto"},
        }
        assert full == {
            **{"data": tmp_path, "work_dir": tmp_path, "output": tmp_path / "a"},
            **{"publish": False, "device": "cpu"},
        }

    def test_localize_names_a_missing_file(self, store: Store) -> None:
        assert "nowhere.yaml" in fail("localize", "nowhere.yaml")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["a.yaml", "b.yaml", "--output", "c"], "--output names one file; 2 tasks were given"),
            (["a.yaml", "--cpus-per-task", "2"], "--cpus-per-task goes with --parallel"),
            (["a.yaml", "--parallel", "--cpus-per-task", "0"], "x>=1"),
            ([], "Missing argument"),
        ],
    )
    def test_localize_refuses_what_does_not_go_together(
        self, store: Store, arguments: list[str], message: str
    ) -> None:
        result = run("localize", *arguments)
        assert result.exit_code == 2
        assert message in result.stderr

    def test_evaluate_prints_the_figures(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import torch

        from localization.evaluation import evaluate

        found = evaluate(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]), 2)
        calls: list[dict[str, Any]] = []

        def evaluate_file(file: Path, **options: Any) -> tuple[int, tuple[str, ...], Any]:
            calls.append({"file": file, **options})
            return 7, ("bad", "good"), found

        monkeypatch.setattr("localization.runs.evaluate_file", evaluate_file)
        output = succeed(
            "evaluate", "mood", "rows.csv", "--text", "a", "--text", "b", "--label", "c"
        )
        for part in ("mood, version 7, on 4 rows of rows.csv", "75.00%", "F1 of good", "80.00%"):
            assert part in output
        assert calls[0].pop("store").root == store.root
        assert calls[0] == {
            **{"file": Path("rows.csv"), "task": "mood", "version": None, "device": "auto"},
            **{"text": ("a", "b"), "label": "c"},
        }
        answer = as_promised("evaluate", succeed("evaluate", "mood", "rows.csv", "--json"))
        assert (answer["version"], answer["rows"], answer["accuracy"]) == (7, 4, 0.75)
        assert answer["f1"]["good"] == pytest.approx(0.8)
