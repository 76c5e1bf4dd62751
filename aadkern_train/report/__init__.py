"""The report of a run: one self-contained page, pictures of its clips, and what a terminal shows of it."""

from aadkern_train.report.images import write_contact_sheet
from aadkern_train.report.page import write_report
from aadkern_train.report.reading import read_run
from aadkern_train.report.summary import summary, text_table

__all__ = ["read_run", "summary", "text_table", "write_contact_sheet", "write_report"]
