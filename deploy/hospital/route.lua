-- Orthanc sends the MR series of each study to `listen` once no image of it has come for StableAge seconds, and not again when results come.

local OURS = 'isles-ensemble' -- Manufacturer of the results
local TO = 'isles'            -- the row of DicomModalities

function OnStableStudy(studyId, tags, metadata)
   local series = ParseJson(RestApiGet('/studies/' .. studyId .. '/series'))
   local images, lastImage, lastResult = {}, '', ''
   for _, each in pairs(series) do
      local about = each['MainDicomTags']
      local updated = each['LastUpdate'] or ''
      if about['Manufacturer'] == OURS then
         if updated > lastResult then lastResult = updated end
      elseif about['Modality'] == 'MR' then
         table.insert(images, each['ID'])
         if updated > lastImage then lastImage = updated end
      end
   end
   if #images > 0 and (lastResult == '' or lastImage > lastResult) then
      RestApiPost('/modalities/' .. TO .. '/store', DumpJson({Resources = images, Asynchronous = true}), true)
   end
end
