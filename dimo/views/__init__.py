"""Pictures: functions of data -> matplotlib Figure. Every interactive view calls the same functions."""
