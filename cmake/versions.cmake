# MLX's Python module shares nanobind's type registry with this extension, so both must be built with the same nanobind
# internals. A mismatch builds, links and loads, and then every call raises a TypeError. Checked here instead.
set(MLX_RELEASES_FILE "${CMAKE_CURRENT_LIST_DIR}/../python/mlx_teacache_fast/mlx_releases.json")

function(check_versions mlx_version nanobind_version)
  file(READ "${MLX_RELEASES_FILE}" table)
  string(JSON needed ERROR_VARIABLE is_unknown GET "${table}" releases "${mlx_version}" nanobind)
  if(NOT is_unknown)
    if(needed VERSION_EQUAL nanobind_version)
      return()
    endif()
    message(FATAL_ERROR
      "nanobind does not match MLX.\n"
      "  found:  nanobind ${nanobind_version}, mlx ${mlx_version}\n"
      "  needed: nanobind ${needed} (whose registry is that of mlx ${mlx_version})\n"
      "  fix:    ${Python_EXECUTABLE} -m pip install nanobind==${needed}")
  endif()
  set(supported "")
  string(JSON last LENGTH "${table}" releases)
  math(EXPR last "${last} - 1")
  foreach(i RANGE ${last})
    string(JSON mlx MEMBER "${table}" releases ${i})
    string(JSON nanobind GET "${table}" releases "${mlx}" nanobind)
    list(APPEND supported "mlx ${mlx} with nanobind ${nanobind}")
  endforeach()
  list(JOIN supported "; " supported)
  string(JSON mlx GET "${table}" source_build)
  string(JSON nanobind GET "${table}" releases "${mlx}" nanobind)
  message(FATAL_ERROR
    "This MLX is not in ${MLX_RELEASES_FILE}.\n"
    "  found:  mlx ${mlx_version}, nanobind ${nanobind_version}\n"
    "  needed: ${supported}\n"
    "  fix:    ${Python_EXECUTABLE} -m pip install mlx==${mlx} nanobind==${nanobind}")
endfunction()
