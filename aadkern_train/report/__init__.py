"""The report of a run: one self-contained page, and pictures of its clips."""

from aadkern_train.report.images import write_contact_sheet
from aadkern_train.report.page import write_report

__all__ = ["write_contact_sheet", "write_report"]
