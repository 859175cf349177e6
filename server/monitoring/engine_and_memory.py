"""The dashboard of what clips are made on: the engine, its core, and memory."""

from __future__ import annotations

from cinecat.server.monitoring.panels import Dashboard, Panel, Query, Row

ENGINE = Row(
    "Engine",
    (
        Panel(
            "What is served",
            "The loaded model, where it runs, and the engine that new clips get.",
            (Query("cinecat_model_info{@}", "{{model}} on {{device}}, {{dtype}}, engine {{engine}}"),),
            "none",
            "stat",
            names=True,
        ),
        Panel(
            "Versions",
            "Of Cinecat, Python and torch.",
            (Query("cinecat_build_info{@}", "Cinecat {{version}}, Python {{python}}, torch {{torch}}"),),
            "none",
            "stat",
            names=True,
        ),
        Panel(
            "Being built",
            "Whether the engine that the settings name is, and torch stands in. Its end is noticed with the next clip.",
            (Query("cinecat_engine_building{@}", "{{instance}}"),),
            "none",
            "stat",
            width=4,
            words={0: "no", 1: "yes"},
        ),
        Panel(
            "Spent on builds",
            "In the shown period.",
            (Query("sum(increase(cinecat_engine_build_seconds_sum{@}[$__range]))", "builds"),),
            "s",
            "stat",
            width=4,
        ),
        Panel(
            "Steps per second, by the engine that ran them",
            "torch beside another engine: that one is being built, or is not built for the sizes asked for. Cached "
            "steps ran on none.",
            (
                Query("sum by (engine) (rate(cinecat_engine_steps_total{@}[5m]))", "{{engine}}"),
                Query("sum(rate(cinecat_cached_steps_total{@}[5m]))", "cached"),
            ),
            "suffix: steps/s",
            width=12,
            stacked=True,
        ),
        Panel(
            "What happened in the engine cache",
            "Within the shown interval. damaged is an engine that was found and not used; evicted went for its size.",
            (Query("sum by (outcome) (increase(cinecat_engine_cache_total{@}[$__rate_interval]))", "{{outcome}}"),),
            "suffix: engines",
            width=12,
            whole=True,
        ),
    ),
)

CORE = Row(
    "Engine core",
    (
        Panel(
            "What it does with its time",
            "Share of the time by kind: encoding (begin), denoising, decoding, sending out. The rest to 100% is idle.",
            (Query("avg by (instance, kind) (rate(cinecat_quantum_seconds_sum{@}[5m]))", "{{kind}} {{instance}}"),),
            "percentunit",
            stacked=True,
        ),
        Panel(
            "Longest 5% of what may not be interrupted",
            "The 95th percentile by kind. No clip can be let in, and none stopped, before such a quantum ends.",
            (
                Query(
                    "histogram_quantile(0.95, sum by (le, kind) (rate(cinecat_quantum_seconds_bucket{@}[5m])))",
                    "{{kind}}",
                ),
            ),
            "s",
        ),
        Panel(
            "Cores started anew",
            "Within the shown interval. Running clips go on from their last checkpoint.",
            (Query("sum by (instance) (increase(cinecat_core_restarts_total{@}[$__rate_interval]))", "{{instance}}"),),
            "none",
            whole=True,
        ),
        Panel(
            "Replicas",
            "Engine cores by model and by what they are about. Jobs of a model wait while none of its cores is ready.",
            (Query("sum by (model, state) (cinecat_replicas{@})", "{{model}} {{state}}"),),
            "none",
            whole=True,
        ),
        Panel(
            "Time to write a checkpoint",
            "Mean and 95th percentile; a clip waits for it.",
            (
                Query(
                    "sum(rate(cinecat_checkpoint_seconds_sum{@}[15m]))"
                    " / sum(rate(cinecat_checkpoint_seconds_count{@}[15m]))",
                    "mean",
                ),
                Query("histogram_quantile(0.95, sum by (le) (rate(cinecat_checkpoint_seconds_bucket{@}[15m])))", "95%"),
            ),
            "s",
        ),
        Panel(
            "Checkpoints written per minute",
            "Of all running clips.",
            (Query("60 * sum by (instance) (rate(cinecat_checkpoint_seconds_count{@}[5m]))", "{{instance}}"),),
            "suffix: /min",
        ),
        Panel(
            "Spent on exchanges between ranks",
            "Share of the time of steps and decoding, on the first rank of a replica. Zero where nothing is sharded.",
            (
                Query(
                    "sum by (instance) (rate(cinecat_communication_seconds_total{@}[5m]))"
                    ' / sum by (instance) (rate(cinecat_quantum_seconds_sum{kind=~"step|decode",@}[5m]))',
                    "{{instance}}",
                ),
            ),
            "percentunit",
        ),
        Panel(
            "Sent to other ranks",
            "By the first rank of a replica.",
            (Query("sum by (instance) (rate(cinecat_communication_bytes_total{@}[5m]))", "{{instance}}"),),
            "Bps",
        ),
        Panel(
            "Jobs removed by retention",
            "Within the shown interval: for age, for the room that all clips take, or with only files left.",
            (Query("sum by (reason) (increase(cinecat_jobs_removed_total{@}[$__rate_interval]))", "{{reason}}"),),
            "suffix: jobs",
            whole=True,
        ),
    ),
)

MEMORY = Row(
    "Memory of the engine core",
    (
        Panel(
            "Memory of the device",
            "Allocated now, at most so far, and what can still be taken; on a CPU, of the host.",
            (
                Query(
                    'sum by (instance, kind) (cinecat_core_memory_bytes{@, kind!="resident"})', "{{kind}} {{instance}}"
                ),
            ),
            "bytes",
        ),
        Panel(
            "Memory that is left on the device",
            "Share of what this server has and can still take. Below 5% an alert fires.",
            (Query("min by (instance) (cinecat:memory_available:ratio{@})", "{{instance}}"),),
            "percentunit",
            most=1,
            limit=0.05,
            low_is_bad=True,
        ),
        Panel(
            "Memory of its process on the host",
            "Resident. It settles after the first clips; where it keeps growing, something leaks.",
            (Query('sum by (instance) (cinecat_core_memory_bytes{@, kind="resident"})', "{{instance}}"),),
            "bytes",
        ),
    ),
)

FRONT = Row(
    "Front: the process that serves gRPC",
    (
        Panel(
            "CPU",
            "100% is one CPU.",
            (Query("rate(process_cpu_seconds_total{@}[$__rate_interval])", "{{instance}}"),),
            "percentunit",
            width=6,
        ),
        Panel(
            "Resident memory",
            "It holds frames and files of the clips that are being finished.",
            (Query("process_resident_memory_bytes{@}", "{{instance}}"),),
            "bytes",
            width=6,
        ),
        Panel(
            "Open files and connections",
            "Share of what the process may have open.",
            (Query("process_open_fds{@} / process_max_fds{@}", "{{instance}}"),),
            "percentunit",
            width=6,
            most=1,
        ),
        Panel(
            "Running for",
            "Since the start of the server.",
            (Query("time() - process_start_time_seconds{@}", "{{instance}}"),),
            "s",
            width=6,
        ),
    ),
)

ENGINE_AND_MEMORY = Dashboard(
    "cinecat-engine-memory",
    "Cinecat: engine and memory",
    "Which engine runs, what its core does, and how much memory is left.",
    (ENGINE, CORE, MEMORY, FRONT),
)
