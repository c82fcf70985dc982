"""The simulated cohort: five modalities with reports, labels and prompts.

It is a simulation. It proves the machinery, not medicine.
"""

from m3bind.data.phantom.cohort import make_cohort, make_record, simulate
from m3bind.data.phantom.patients import Patient, make_patient
from m3bind.data.phantom.table import table

__all__ = ["Patient", "make_cohort", "make_patient", "make_record", "simulate", "table"]
