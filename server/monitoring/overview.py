"""The dashboard of whoever runs the servers: is it up, who waits how long, where does the time go."""

from __future__ import annotations

from cinecat.server.monitoring.panels import Dashboard, Panel, Query, Row

# Two percentiles of one recorded latency, of the slowest of the chosen servers.
_PERCENTILES = (("p50", "{{priority}} median"), ("p95", "{{priority}} 95%"))


def _latency(title: str, description: str, metric: str) -> Panel:
    queries = tuple(
        Query(f"max by (priority) (cinecat:{metric}:{part}_15m{{@}})", legend) for part, legend in _PERCENTILES
    )
    return Panel(title, f"{description} Of the last 15 minutes, on the slowest server.", queries, "s")


NOW = Row(
    "Now",
    (
        Panel(
            "Takes jobs",
            "Whether the model is loaded and the engine core lives.",
            (Query("cinecat_ready{@}", "{{instance}}"),),
            "none",
            "stat",
            width=4,
            limit=1,
            low_is_bad=True,
            words={0: "no", 1: "yes"},
        ),
        Panel(
            "Alerts that fire",
            "Each has its paragraph in docs/runbook.md.",
            (Query('count(ALERTS{@, alertname=~"Cinecat.*", alertstate="firing"}) or vector(0)', "alerts"),),
            "none",
            "stat",
            width=4,
            limit=1,
        ),
        Panel(
            "Jobs that wait",
            "For the engine core, of both priorities.",
            (Query("sum(cinecat_queue_depth{@})", "jobs"),),
            "none",
            "stat",
            width=4,
        ),
        Panel(
            "Jobs in work",
            "Begun and not ended.",
            (Query('sum(cinecat_jobs{@, state!="queued"})', "jobs"),),
            "none",
            "stat",
            width=4,
        ),
        Panel(
            "Engine core busy",
            "Share of the last 5 minutes. At 100% every further clip adds to the queue.",
            (Query("avg(cinecat:core_busy:ratio_rate5m{@})", "busy"),),
            "percentunit",
            "stat",
            width=4,
        ),
        Panel(
            "Clips that fail",
            "Share of those that ended within 15 minutes, cancelled ones left out. Empty where none ended.",
            (Query("max(cinecat:jobs_failed:ratio_rate15m{@})", "failed"),),
            "percentunit",
            "stat",
            width=4,
            limit=0.1,
        ),
    ),
)

OUTCOMES = Row(
    "What becomes of jobs",
    (
        Panel(
            "Jobs that end, per minute",
            "By outcome.",
            (Query("60 * sum by (outcome) (cinecat:jobs_ended:rate5m{@})", "{{outcome}}"),),
            "suffix: /min",
            stacked=True,
        ),
        Panel(
            "Failed jobs since the start, by error and by what they failed in",
            "`cinecat jobs show ID` and the server's log have the words to the code. Empty where none has failed.",
            (
                Query(
                    "sum by (code, state) (cinecat_job_errors_total{@})",
                    "{{code}} in {{state}}",
                ),
            ),
            "suffix: jobs",
        ),
        Panel(
            "Calls answered with an error, per minute",
            "INVALID_ARGUMENT and NOT_FOUND come from callers, RESOURCE_EXHAUSTED from a full queue, INTERNAL from us.",
            (
                Query(
                    "60 * sum by (method, code) (rate(cinecat_requests_refused_total{@}[$__rate_interval]))",
                    "{{method}} {{code}}",
                ),
            ),
            "suffix: /min",
        ),
    ),
)

WAITING = Row(
    "Who waits",
    (
        Panel(
            "Jobs that wait, and how many may",
            "When they reach the limit (max_queue), new jobs are refused.",
            (
                Query("sum by (priority) (cinecat_queue_depth{@})", "{{priority}}"),
                Query("sum(cinecat_queue_limit{@})", "limit"),
            ),
            "suffix: jobs",
        ),
        _latency("Wait until work begins", "From acceptance to the first work on a job.", "queue_seconds"),
        Panel(
            "Jobs that are not done",
            "By what is being done for them.",
            (Query("sum by (state) (cinecat_jobs{@})", "{{state}}"),),
            "suffix: jobs",
            stacked=True,
        ),
    ),
)

LATENCY = Row(
    "How long it takes",
    (
        _latency("From request to clip", "From acceptance to success.", "job_seconds"),
        _latency(
            "From request to first preview",
            "The first picture of an unfinished clip, where previews were asked for.",
            "first_preview_seconds",
        ),
        _latency("From request to first frame", "The first decoded frames of the clip.", "first_frame_seconds"),
    ),
)

STAGES = Row(
    "Where the time goes",
    (
        Panel(
            "Mean time of a clip in each stage",
            "Of clips that succeeded, waiting included; look-ups in the caches are left out.",
            (
                Query(
                    'sum by (stage) (rate(cinecat_stage_seconds_sum{@, cached="false"}[15m]))'
                    ' / sum by (stage) (rate(cinecat_stage_seconds_count{@, cached="false"}[15m]))',
                    "{{stage}}",
                ),
            ),
            "s",
            width=12,
        ),
        Panel(
            "Longest 5% of each stage",
            "The 95th percentile of the last 15 minutes, look-ups in the caches left out.",
            (
                Query(
                    "histogram_quantile(0.95, sum by (le, stage) "
                    '(rate(cinecat_stage_seconds_bucket{@, cached="false"}[15m])))',
                    "{{stage}}",
                ),
            ),
            "s",
            width=12,
        ),
        Panel(
            "Encodings taken from the cache",
            "Share of prompts, images and conditions that were known already.",
            (
                Query(
                    'sum by (stage) (rate(cinecat_stage_seconds_count{@, cached="true"}[15m]))'
                    ' / sum by (stage) (rate(cinecat_stage_seconds_count{@, stage=~".*_encode"}[15m]))',
                    "{{stage}}",
                ),
            ),
            "percentunit",
            most=1,
        ),
        Panel(
            "Clips that share a step",
            "Mean, and the 95th percentile. More is done in the same time the more share, where that is quicker.",
            (
                Query(
                    "sum(rate(cinecat_step_jobs_sum{@}[$__rate_interval]))"
                    " / sum(rate(cinecat_step_jobs_count{@}[$__rate_interval]))",
                    "mean",
                ),
                Query(
                    "histogram_quantile(0.95, sum by (le) (rate(cinecat_step_jobs_bucket{@}[$__rate_interval])))", "95%"
                ),
            ),
            "suffix: clips",
        ),
        Panel(
            "Clips sent out for more urgent ones, and clips that went on",
            "Within the shown interval. Clips go on from a checkpoint when they were sent out, or core or server died.",
            (
                Query("sum(increase(cinecat_preemptions_total{@}[$__rate_interval]))", "sent out"),
                Query("sum(increase(cinecat_resumes_total{@}[$__rate_interval]))", "went on"),
                Query("sum(increase(cinecat_core_restarts_total{@}[$__rate_interval]))", "cores started anew"),
            ),
            "none",
            whole=True,
        ),
    ),
)

TENANTS = Row(
    "Who has the engine core",
    (
        Panel(
            "Share of the engine core, by tenant",
            "100% is one core that never rests.",
            (Query("sum by (tenant) (rate(cinecat_tenant_device_seconds_total{@}[5m]))", "{{tenant}}"),),
            "percentunit",
            width=12,
            stacked=True,
        ),
        Panel(
            "Time of the engine core in the shown period, by tenant",
            "The ten that had most.",
            (
                Query(
                    "topk(10, sum by (tenant) (increase(cinecat_tenant_device_seconds_total{@}[$__range])))",
                    "{{tenant}}",
                ),
            ),
            "s",
            "bargauge",
            width=12,
        ),
    ),
)

OVERVIEW = Dashboard(
    "cinecat-overview",
    "Cinecat: overview",
    "Is it up, who waits how long, where does the time go.",
    (NOW, OUTCOMES, WAITING, LATENCY, STAGES, TENANTS),
)
