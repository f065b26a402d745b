-- What every load has in common: settings from the environment, and one line of JSON at the end.
local common = {}

function common.setting(name, default)
  local value = os.getenv(name)
  if value == nil or value == "" then return default end
  return value
end

function common.report(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    'JSON {"requests": %d, "microseconds": %d, "refused": %d, "broken": %d, "p50_ms": %.3f, "p99_ms": %.3f}\n',
    summary.requests, summary.duration, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end

return common
