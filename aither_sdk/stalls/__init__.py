"""Stalls of an event loop: seen, explained and told while they last.

record    what is known of a stall, and how it reads as a span, an event, a log line
causes    from a reading to a verdict; pure
stacks    frames as values, whose code is to blame, faulthandler's text; pure
gauges    what the kernel and Python count: CPU, waits, collections, throttling
sampling  the loop's stack, task and trace context, taken from another thread
evidence  the signal that makes a thread write its stack without the GIL
otlp      spans to a collector without the OpenTelemetry SDK
telling   spans, log line, counters, events; bounded
watchdog  the thread: waits for silence, samples, judges, tells
watch     all of it together: `with aither_sdk.watch():`
"""
