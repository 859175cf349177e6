"""What an operator sees: Grafana's dashboards as code, Prometheus' rules and configuration."""
