-- Uploads of FILE. FIELDS: name=value;name=value, empty: the body is the file itself. Eight bodies
-- take turns that differ in bytes after the picture's end, so that their hashes do.
local common = dofile(os.getenv("COMMON"))
local BOUNDARY = "----loupe-bench-7d1f3a"
local requests, number = {}, 0

local function part(head, value)
  return "--" .. BOUNDARY .. "\r\nContent-Disposition: form-data; " .. head .. "\r\n\r\n" .. value .. "\r\n"
end

local function form(fields, picture)
  local parts = {}
  for name, value in string.gmatch(fields, "([^=;]+)=([^;]*)") do
    parts[#parts + 1] = part('name="' .. name .. '"', value)
  end
  parts[#parts + 1] =
    part('name="file"; filename="bench.jpg"\r\nContent-Type: image/jpeg', picture)
  return table.concat(parts) .. "--" .. BOUNDARY .. "--\r\n"
end

function init()
  local file = assert(io.open(common.setting("FILE"), "rb"))
  local picture = file:read("*a")
  file:close()
  local fields = common.setting("FIELDS")
  local headers = {
    Authorization = common.setting("AUTHORIZATION"),
    ["Content-Type"] = fields and "multipart/form-data; boundary=" .. BOUNDARY or "image/jpeg",
  }
  for i = 1, 8 do
    local one = picture .. string.format("%08d", i)
    requests[i] = wrk.format("POST", wrk.path, headers, fields and form(fields, one) or one)
  end
end

function request()
  number = number + 1
  return requests[number % #requests + 1]
end

function done(summary, latency) common.report(summary, latency) end
