-- GETs. AUTHORIZATION, ACCEPT: headers. PATHS: a file with a path on each line, asked in turn from
-- line ROUND * 1000, so that no round asks for what another has.
local common = dofile(os.getenv("COMMON"))
local requests, number = {}, 0

function init()
  local headers = {
    Authorization = common.setting("AUTHORIZATION"),
    Accept = common.setting("ACCEPT", "*/*"),
  }
  local paths = common.setting("PATHS")
  if paths then
    for path in io.lines(paths) do requests[#requests + 1] = wrk.format("GET", path, headers) end
  else
    requests[1] = wrk.format("GET", wrk.path, headers)
  end
  number = common.setting("ROUND", 0) * 1000
end

function request()
  number = number + 1
  return requests[number % #requests + 1]
end

function done(summary, latency) common.report(summary, latency) end
