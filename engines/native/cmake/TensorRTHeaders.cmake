# Where TensorRT's headers are. The plugin needs no library of it: its headers alone.

set(TENSORRT_INCLUDE_DIR "$ENV{TENSORRT_INCLUDE_DIR}" CACHE STRING
    "Folder with NvInfer.h, or several separated by semicolons, one per major version")
set(MOE3D_FETCH_TENSORRT "" CACHE STRING
    "Tags of NVIDIA's public repository to download the headers from, such as v10.3.0;v11.1; empty: download nothing")
set(MOE3D_TENSORRT_REPOSITORY "https://github.com/NVIDIA/TensorRT.git" CACHE STRING "Where those tags are")

# Sets `out` to the folders with headers, empty where there are none.
function(moe3d_tensorrt_headers out)
  if(TENSORRT_INCLUDE_DIR)
    foreach(folder IN LISTS TENSORRT_INCLUDE_DIR)
      if(NOT EXISTS "${folder}/NvInfer.h")
        message(FATAL_ERROR "TENSORRT_INCLUDE_DIR: there is no NvInfer.h in ${folder}; name the folder that has it")
      endif()
    endforeach()
    set(${out} "${TENSORRT_INCLUDE_DIR}" PARENT_SCOPE)
    return()
  endif()
  set(folders "")
  include(FetchContent)
  foreach(tag IN LISTS MOE3D_FETCH_TENSORRT)
    string(MAKE_C_IDENTIFIER "tensorrt_${tag}" name)
    # No CMakeLists.txt lies in include/, so that nothing of the repository is configured.
    FetchContent_Declare(${name} GIT_REPOSITORY "${MOE3D_TENSORRT_REPOSITORY}" GIT_TAG "${tag}" GIT_SHALLOW TRUE
                         GIT_SUBMODULES "" SOURCE_SUBDIR include)
    FetchContent_MakeAvailable(${name})
    string(TOLOWER "${name}" lower)
    list(APPEND folders "${${lower}_SOURCE_DIR}/include")
  endforeach()
  if(NOT folders)
    find_path(MOE3D_TENSORRT_INSTALLED NvInfer.h
              HINTS ENV TENSORRT_ROOT PATH_SUFFIXES include PATHS /usr/local/tensorrt /opt/tensorrt)
    mark_as_advanced(MOE3D_TENSORRT_INSTALLED)
    if(MOE3D_TENSORRT_INSTALLED)
      set(folders "${MOE3D_TENSORRT_INSTALLED}")
    endif()
  endif()
  set(${out} "${folders}" PARENT_SCOPE)
endfunction()

# Sets `major` and `minor` to the version of the headers in `folder`.
function(moe3d_tensorrt_version folder major minor)
  file(STRINGS "${folder}/NvInferVersion.h" lines REGEX "define +(NV_TENSORRT|TRT)_(MAJOR|MINOR)(_ENTERPRISE)? +[0-9]+")
  foreach(part IN ITEMS MAJOR MINOR)
    string(REGEX MATCH "_${part}(_ENTERPRISE)? +([0-9]+)" found "${lines}")
    if(NOT found)
      message(FATAL_ERROR "${folder}/NvInferVersion.h does not name its version; expected TensorRT 10.3 or newer")
    endif()
    set(${part} "${CMAKE_MATCH_2}")
  endforeach()
  set(${major} "${MAJOR}" PARENT_SCOPE)
  set(${minor} "${MINOR}" PARENT_SCOPE)
endfunction()
