"""What a computation takes: live storages (tracker), the driver's own figures (nvml) and time (timer)."""
