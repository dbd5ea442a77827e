"""Everything that is changed in vLLM itself: the one package that replaces its attributes.

`table` lists every change and says when each is applied; `patch` is what a row is. The rows stand
beside what they put in vLLM's place: `config_and_cli`, `scheduler_and_metrics`, `cpu_runner`, and
`runtime` for those whose replacement is the engine's. Everything else in the plugin is subclassing
and vLLM's public entry points.
"""
