"""The tables of faults in docs/reliability.md."""

from tests.faults import catalog, tried
from tools import list_faults


def test_the_page_has_the_tables_of_all_faults():
  page = list_faults.PAGE.read_text()
  assert list_faults.insert_tables(page) == page


def test_every_fault_has_one_row():
  rows = list_faults.make_tables().splitlines()
  for case in (*catalog.WORKDIR, *tried.OTHERS):
    assert sum(row.startswith(f"| {case.fault} |") for row in rows) == 1
