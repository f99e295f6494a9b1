"""`python -m pytest lesson` says one line per exercise in place of pytest's own report, which -v brings back."""
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(trylast=True)                                   # the report that it replaces is there by then
def pytest_configure(config):
    asked = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    ours = all(HERE in (path, *path.parents) for path in asked)
    if ours and not (config.option.verbose > 0 or config.option.usepdb or config.option.collectonly):
        config.pluginmanager.unregister(name="terminalreporter")
        config.pluginmanager.register(Lines())


class Lines:
    """A test's line: its name, and the first line of what its exception says."""

    def __init__(self):
        self.right = self.count = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        test, _, which = item.name.removeprefix("test_").rstrip("]").partition("[")
        said = str(call.excinfo.value) if call.excinfo else "right"
        report.line = f"{which if test == 'exercise' else f'{test} {which}':<18}  {said.partition(chr(10))[0]}"
        return report

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed:
            self.count, self.right = self.count + 1, self.right + report.passed
            print(report.line, flush=True)

    def pytest_collectreport(self, report):
        if report.failed:
            print(f"{report.nodeid}: {report.longreprtext.splitlines()[-1]}", flush=True)

    def pytest_sessionfinish(self):
        print(f"{self.right} of {self.count} right" if self.count else "no exercise has such a name")
