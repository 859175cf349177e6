"""The dashboard of what clips ask for: uniform tokens or CAT, and styles."""

from __future__ import annotations

from cinecat.server.monitoring.panels import Dashboard, Panel, Query, Row

_BY_STEP = "tokenization, bucket, jobs"
_STEP_LEGEND = "{{tokenization}}, up to {{bucket}} tokens, up to {{jobs}} clips"

THROUGHPUT = Row(
    "Uniform against CAT: what comes out",
    (
        Panel(
            "Tokens denoised per second",
            "Of all rows and steps. CAT takes fewer for the same clip, so fewer are no loss.",
            (Query("sum by (tokenization) (cinecat:tokens:rate5m{@})", "{{tokenization}}"),),
            "si:tokens/s",
        ),
        Panel(
            "Frames finished per second",
            "Of clips that succeeded.",
            (Query("sum by (tokenization) (rate(cinecat_frames_total{@}[5m]))", "{{tokenization}}"),),
            "suffix: frames/s",
        ),
        Panel(
            "Megapixels finished per second",
            "The same by their size, which makes clips of different sizes comparable.",
            (Query("sum by (tokenization) (rate(cinecat_megapixels_total{@}[5m]))", "{{tokenization}}"),),
            "si:Mpx/s",
        ),
    ),
)

GAIN = Row(
    "Uniform against CAT: what it costs",
    (
        Panel(
            "Work done in a second of stepping",
            "Tokens that the uniform path would have taken for the same clips, by the time that their steps took. The "
            "higher curve gets more done; compare them where both ran clips of like size.",
            (Query("avg by (tokenization) (cinecat:work_per_step_second:rate15m{@})", "{{tokenization}}"),),
            "si:tokens/s",
        ),
        Panel(
            "Tokens kept",
            "Of those that the uniform path takes. Of CAT clips, the first steps, which keep all, included.",
            (Query("avg by (tokenization) (cinecat:tokens_kept:ratio_rate15m{@})", "{{tokenization}}"),),
            "percentunit",
            most=1,
        ),
        Panel(
            "Keep ratios of finished CAT clips",
            "Median, and the tenth of them that kept least and most.",
            tuple(
                Query(f"histogram_quantile({part}, sum by (le) (rate(cinecat_keep_ratio_bucket{{@}}[15m])))", legend)
                for part, legend in ((0.1, "least 10%"), (0.5, "median"), (0.9, "most 10%"))
            ),
            "percentunit",
            most=1,
        ),
    ),
)

STEPS = Row(
    "Steps",
    (
        Panel(
            "Mean time of a step",
            "One denoising step of all clips that share it, by path, tokens and clips.",
            (
                Query(
                    f"sum by ({_BY_STEP}) (rate(cinecat_step_seconds_sum{{@}}[5m]))"
                    f" / sum by ({_BY_STEP}) (rate(cinecat_step_seconds_count{{@}}[5m]))",
                    _STEP_LEGEND,
                ),
            ),
            "s",
            width=12,
        ),
        Panel(
            "Longest 5% of steps",
            "Where these lie far above the mean, something else uses the device or the host.",
            (
                Query(
                    f"histogram_quantile(0.95, sum by (le, {_BY_STEP}) (rate(cinecat_step_seconds_bucket{{@}}[5m])))",
                    _STEP_LEGEND,
                ),
            ),
            "s",
            width=12,
        ),
        Panel(
            "Steps per second",
            "By path, tokens and clips: what the engine core is asked for.",
            (
                Query(
                    f"sum by ({_BY_STEP}) (rate(cinecat_step_seconds_count{{@}}[5m]))",
                    _STEP_LEGEND,
                ),
            ),
            "suffix: steps/s",
            width=12,
            stacked=True,
        ),
        Panel(
            "Time of the engine core in steps, by path",
            "Share of one core's time.",
            (Query("sum by (tokenization) (rate(cinecat_step_seconds_sum{@}[5m]))", "{{tokenization}}"),),
            "percentunit",
            width=12,
            stacked=True,
        ),
    ),
)

STYLES = Row(
    "Styles",
    (
        Panel(
            "Share of the engine core, by style",
            "none is clips without a style. A clip that wears several counts for each.",
            (Query("topk(10, sum by (style) (rate(cinecat_style_device_seconds_total{@}[5m])))", "{{style}}"),),
            "percentunit",
            width=12,
        ),
        Panel(
            "Time of the engine core in the shown period, by style",
            "The ten that had most.",
            (
                Query(
                    "topk(10, sum by (style) (increase(cinecat_style_device_seconds_total{@}[$__range])))", "{{style}}"
                ),
            ),
            "s",
            "bargauge",
            width=12,
        ),
        Panel(
            "What clips found in the slots, per minute",
            "Hits cost nothing. Loads with evictions: more styles are in use than there are slots (style_slots).",
            (
                Query("60 * sum(rate(cinecat_style_slot_hits_total{@}[5m]))", "hits"),
                Query("60 * sum(rate(cinecat_style_slot_loads_total{@}[5m]))", "loads"),
                Query("60 * sum(rate(cinecat_style_slot_evictions_total{@}[5m]))", "evictions"),
            ),
            "suffix: /min",
        ),
        Panel(
            "Slots in use",
            "A style that was used lately keeps its slot until another needs it.",
            (
                Query("sum(cinecat_style_slots_resident{@})", "in use"),
                Query("sum(cinecat_style_slots{@})", "there are"),
            ),
            "suffix: slots",
        ),
        Panel(
            "Time to bring a style into a slot",
            "Mean and 95th percentile. A copy where the style is in memory, or reading and checking its file first.",
            (
                Query(
                    "sum(rate(cinecat_style_swap_seconds_sum{@}[15m]))"
                    " / sum(rate(cinecat_style_swap_seconds_count{@}[15m]))",
                    "mean",
                ),
                Query("histogram_quantile(0.95, sum by (le) (rate(cinecat_style_swap_seconds_bucket{@}[15m])))", "95%"),
            ),
            "s",
        ),
        Panel(
            "Time of the engine core spent on moving styles",
            "Share of what it works; above a tenth, with evictions, an alert fires.",
            (Query("max(cinecat:style_swap:ratio_rate15m{@})", "moving styles"),),
            "percentunit",
            limit=0.1,
        ),
    ),
)

PATHS_AND_STYLES = Dashboard(
    "cinecat-paths-styles",
    "Cinecat: paths and styles",
    "Uniform tokens against CAT, steps, and what styles cost.",
    (THROUGHPUT, GAIN, STEPS, STYLES),
)
