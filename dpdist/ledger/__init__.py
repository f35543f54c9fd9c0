"""The privacy ledger of a run, and the budget that runs on a data set share."""
