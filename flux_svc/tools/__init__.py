"""Tools for the files of a log, run as `python -m flux_svc.tools` by `aither flux`: processes of
their own, so that they work whether Flux runs or not."""
