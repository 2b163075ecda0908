"""Cases for every test here that wants one: those of `--golden`, else those that are copied to tests/data."""

from s4v.tests.golden.cases import DATA, find_cases, find_schedules


def pytest_generate_tests(metafunc):
    root = metafunc.config.getoption("--golden") or DATA
    if "case" in metafunc.fixturenames:
        cases = find_cases(root)
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])
    if "schedule" in metafunc.fixturenames:
        schedules = find_schedules(root)
        metafunc.parametrize("schedule", schedules, ids=[str(path.relative_to(root)) for path in schedules])
